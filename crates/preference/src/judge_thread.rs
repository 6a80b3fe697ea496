//! The thread on which a judge computes, so that no async task ever waits for it on its own thread.
//!
//! One batch is judged at a time. A panic ends the thread and is told to whoever waits for the batch;
//! the next question starts another thread with a new judge, where one can be made.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use crate::bench::{Answer, Question, Rebuild, Replica};
use crate::{Judge, JudgeError, JudgeErrorKind, PreferenceError};

/// The thread, from outside. Dropping it ends the thread after the batch it is at.
pub(crate) struct JudgeThread {
    judge: String,
    thread: String,
    rebuild: Option<Rebuild>,
    /// `None` after a panic.
    commands: Mutex<Option<Sender<Command>>>,
}

struct Command {
    batch: Vec<Question>,
    reply: oneshot::Sender<Reply>,
}

/// What became of a batch, or the message of the panic that ended the thread.
type Reply = Result<Result<Vec<Answer>, JudgeError>, String>;

impl JudgeThread {
    /// Starts the thread `preference-judge`, which owns `judge` from here on; those of an `index` above
    /// 0 have it in their name.
    pub(crate) fn start(
        index: usize,
        judge: Box<dyn Judge>,
        rebuild: Option<Rebuild>,
    ) -> Result<Self, PreferenceError> {
        let thread = match index {
            0 => "preference-judge".to_owned(),
            index => format!("preference-judge-{index}"),
        };
        let started = Self {
            judge: judge.name().to_owned(),
            thread,
            rebuild,
            commands: Mutex::new(None),
        };
        let commands = started.spawn(move |commands| serve(judge, commands))?;
        *started.commands() = Some(commands);
        Ok(started)
    }

    fn spawn(
        &self,
        body: impl FnOnce(Receiver<Command>) + Send + 'static,
    ) -> Result<Sender<Command>, PreferenceError> {
        // One more than the batch it is at: the one that follows a batch that was given up.
        let (commands, received) = bounded(1);
        thread::Builder::new()
            .name(self.thread.clone())
            .spawn(move || body(received))
            .map_err(|source| PreferenceError::Thread {
                judge: self.judge.clone(),
                thread: self.thread.clone(),
                source,
            })?;
        Ok(commands)
    }

    fn commands(&self) -> std::sync::MutexGuard<'_, Option<Sender<Command>>> {
        // Each change is one assignment: it is sound even after a panic.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The way to the thread, which is started again if it has ended and can be.
    fn running(&self) -> Result<Sender<Command>, JudgeError> {
        let mut commands = self.commands();
        if let Some(commands) = &*commands {
            return Ok(commands.clone());
        }
        let Some(rebuild) = self.rebuild.clone() else {
            let reason = "it has panicked before";
            return Err(JudgeError::of(JudgeErrorKind::Dead, reason));
        };
        let started = self.spawn(move |commands| rebuild_and_serve(&rebuild, commands));
        let started = started.map_err(|error| JudgeError::new(format!("failed to {error}")))?;
        tracing::warn!(
            judge = self.judge,
            thread = self.thread,
            "making the judge again after a panic"
        );
        Ok(commands.insert(started).clone())
    }

    /// The thread is gone, with `message`.
    fn ended(&self, message: &str) -> JudgeError {
        *self.commands() = None;
        let kind = match self.rebuild {
            Some(_) => JudgeErrorKind::Panicked,
            None => JudgeErrorKind::Dead,
        };
        JudgeError::of(kind, message)
    }

    async fn judge(&self, batch: Vec<Question>) -> Result<Vec<Answer>, JudgeError> {
        let (reply, answer) = oneshot::channel();
        let mut sent = self.running()?.try_send(Command { batch, reply });
        if let Err(TrySendError::Disconnected(command)) = sent {
            // It ended after its last batch had been given up, or could not be made again.
            *self.commands() = None;
            sent = self.running()?.try_send(command);
        }
        if sent.is_err() {
            return Err(JudgeError::new("it is still at a batch that took too long"));
        }
        match answer.await {
            Ok(Ok(judged)) => judged,
            Ok(Err(panic)) => Err(self.ended(&format!("it panicked: {panic}"))),
            Err(_) => Err(self.ended("its thread has ended without an answer")),
        }
    }
}

impl Replica for JudgeThread {
    fn name(&self) -> &str {
        &self.thread
    }

    fn ask<'a>(&'a self, batch: &'a [Question]) -> BoxFuture<'a, Result<Vec<Answer>, JudgeError>> {
        Box::pin(self.judge(batch.to_vec()))
    }
}

fn serve(mut judge: Box<dyn Judge>, commands: Receiver<Command>) {
    while let Ok(Command { batch, reply }) = commands.recv() {
        if reply.is_closed() {
            // It waited behind a batch that took too long, and was given up too.
            continue;
        }
        // A judge that has panicked is never asked again, so it may be left in any state.
        let judged = catch_unwind(AssertUnwindSafe(|| answers(&mut *judge, &batch)));
        drop(batch);
        match judged {
            // Whoever asked may have given it up: the next is judged all the same.
            Ok(judged) => drop(reply.send(Ok(judged))),
            Err(panic) => {
                // No more commands from here on, so that none is left lying without an answer.
                drop(commands);
                drop(reply.send(Err(message_of(&*panic))));
                return;
            }
        }
    }
}

/// A judge that cannot be made is a failure of its first batch, and the thread's end.
fn rebuild_and_serve(rebuild: &Rebuild, commands: Receiver<Command>) {
    let reason = match catch_unwind(AssertUnwindSafe(|| rebuild())) {
        Ok(Ok(judge)) => return serve(judge, commands),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => message_of(&*panic),
    };
    if let Ok(Command { reply, .. }) = commands.recv() {
        let error = JudgeError::new(format!("it could not be made again: {reason}"));
        drop(commands);
        drop(reply.send(Ok(Err(error))));
    }
}

fn answers(judge: &mut dyn Judge, batch: &[Question]) -> Result<Vec<Answer>, JudgeError> {
    let comparisons: Vec<_> = batch.iter().map(Question::comparison).collect();
    let version = judge.version();
    let scored = judge.judge_scored(&comparisons)?.into_iter();
    Ok(scored
        .map(|scored| Answer {
            scores: scored.scores,
            ..Answer::new(scored.verdict, version)
        })
        .collect())
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use messages::JudgeVersion;

    use super::*;
    use crate::judge::fake::{FakeJudge, pair, preferred};

    fn start(judge: FakeJudge, rebuild: Option<Rebuild>) -> JudgeThread {
        JudgeThread::start(0, Box::new(judge), rebuild).expect("a thread")
    }

    fn question() -> Question {
        Question::new(Arc::new(pair(0, &["a", "b"])), 0, 1)
    }

    #[tokio::test]
    async fn the_judge_has_a_thread_of_its_own_which_ends_with_the_replica() {
        let (told, name) = std::sync::mpsc::channel();
        let thread = start(
            FakeJudge::answering(move |_| {
                told.send(thread::current().name().map(str::to_owned))
                    .unwrap();
                preferred(0.25)
            }),
            None,
        );
        let answers = thread.ask(&[question()]).await.expect("it answers");
        let expected = Answer::new(preferred(0.25), JudgeVersion(7));
        assert_eq!(answers, [expected]);
        drop(thread);
        assert_eq!(name.recv().unwrap().as_deref(), Some("preference-judge"));
        assert!(name.recv().is_err(), "the judge is gone");
    }

    #[tokio::test]
    async fn a_panic_is_told_at_once_and_ever_after_where_no_judge_can_be_made() {
        let thread = start(
            FakeJudge::new(|batch| panic!("{} are too many", batch.len())),
            None,
        );
        for reason in ["it panicked: 1 are too many", "it has panicked before"] {
            let error = thread.ask(&[question()]).await.expect_err("it panicked");
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (JudgeErrorKind::Dead, reason)
            );
        }
    }

    #[tokio::test]
    async fn a_judge_that_panicked_is_made_again_when_it_is_asked_again() {
        let mut made = 0;
        let made = Mutex::new(move || {
            made += 1;
            match made {
                1 => Err(JudgeError::new("no memory")),
                _ => Ok(Box::new(FakeJudge::answering(|_| preferred(0.75))) as Box<dyn Judge>),
            }
        });
        let rebuild: Rebuild = Arc::new(move || (*made.lock().unwrap())());
        let thread = start(FakeJudge::new(|_| panic!("oh")), Some(rebuild));
        let mut failures = Vec::new();
        let answers = loop {
            match thread.ask(&[question()]).await {
                Ok(answers) => break answers,
                Err(error) => failures.push((error.kind(), error.to_string())),
            }
        };
        assert_eq!(
            failures,
            [
                (JudgeErrorKind::Panicked, "it panicked: oh".to_owned()),
                (
                    JudgeErrorKind::Transient,
                    "it could not be made again: no memory".to_owned()
                ),
            ]
        );
        assert_eq!(answers[0].verdict, preferred(0.75));
    }
}
