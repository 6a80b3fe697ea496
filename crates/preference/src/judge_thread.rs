//! Replica on a named thread of its own, so that a judge never blocks the async runtime.
//!
//! Judges one batch at a time. A panic ends the thread and fails the batch; the next batch starts a new thread with a
//! rebuilt judge, where a rebuild function is given.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use crate::error::{JudgeError, JudgeErrorKind, PreferenceError};
use crate::judge::Judge;
use crate::pool::{ComparisonRequest, Rebuild, Replica, VersionedVerdict};

/// Handle of a judge thread. Dropping it ends the thread after its current batch.
pub(crate) struct JudgeThread {
    judge: String,
    thread: String,
    rebuild: Option<Rebuild>,
    /// `None` after a panic.
    commands: Mutex<Option<Sender<JudgeCommand>>>,
}

/// A batch for the thread.
struct JudgeCommand {
    batch: Vec<ComparisonRequest>,
    reply: oneshot::Sender<BatchReply>,
}

/// Result of a batch, or the message of the panic that ended the thread.
type BatchReply = Result<Result<Vec<VersionedVerdict>, JudgeError>, String>;

impl JudgeThread {
    /// Starts the thread `preference-judge`, or `preference-judge-<index>` for an `index` above 0, which owns `judge`.
    pub(crate) fn start(
        index: usize,
        judge: Box<dyn Judge>,
        rebuild: Option<Rebuild>,
    ) -> Result<Self, PreferenceError> {
        let thread = match index {
            0 => "preference-judge".to_owned(),
            index => format!("preference-judge-{index}"),
        };
        let handle = Self {
            judge: judge.name().to_owned(),
            thread,
            rebuild,
            commands: Mutex::new(None),
        };
        let commands = handle.spawn(move |commands| serve(judge, commands))?;
        *handle.commands() = Some(commands);
        Ok(handle)
    }

    fn spawn(
        &self,
        body: impl FnOnce(Receiver<JudgeCommand>) + Send + 'static,
    ) -> Result<Sender<JudgeCommand>, PreferenceError> {
        // The batch after the current one, in case that was abandoned.
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

    fn commands(&self) -> std::sync::MutexGuard<'_, Option<Sender<JudgeCommand>>> {
        // Each change is one assignment: the value is valid even after a panic.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Command channel of the thread, which is restarted if it has ended and the judge can be rebuilt.
    fn running(&self) -> Result<Sender<JudgeCommand>, JudgeError> {
        let mut commands = self.commands();
        if let Some(commands) = &*commands {
            return Ok(commands.clone());
        }
        let Some(rebuild) = self.rebuild.clone() else {
            let reason = "it panicked earlier";
            return Err(JudgeError::with_kind(JudgeErrorKind::Dead, reason));
        };
        let started = self.spawn(move |commands| rebuild_and_serve(&rebuild, commands));
        let started = started.map_err(|error| JudgeError::new(error.to_string()))?;
        tracing::warn!(
            judge = self.judge,
            thread = self.thread,
            "rebuilding the judge after a panic"
        );
        Ok(commands.insert(started).clone())
    }

    /// Records that the thread has ended, with this message.
    fn ended(&self, message: &str) -> JudgeError {
        *self.commands() = None;
        let kind = match self.rebuild {
            Some(_) => JudgeErrorKind::Panicked,
            None => JudgeErrorKind::Dead,
        };
        JudgeError::with_kind(kind, message)
    }

    async fn judge_batch(
        &self,
        batch: Vec<ComparisonRequest>,
    ) -> Result<Vec<VersionedVerdict>, JudgeError> {
        let (reply, answer) = oneshot::channel();
        let mut sent = self.running()?.try_send(JudgeCommand { batch, reply });
        if let Err(TrySendError::Disconnected(command)) = sent {
            // It ended after an abandoned batch, or its judge could not be rebuilt.
            *self.commands() = None;
            sent = self.running()?.try_send(command);
        }
        if sent.is_err() {
            return Err(JudgeError::new(
                "it is still busy with a batch that timed out",
            ));
        }
        match answer.await {
            Ok(Ok(judged)) => judged,
            Ok(Err(panic)) => Err(self.ended(&format!("it panicked: {panic}"))),
            Err(_) => Err(self.ended("its thread ended without a reply")),
        }
    }
}

impl Replica for JudgeThread {
    fn name(&self) -> &str {
        &self.thread
    }

    fn judge<'a>(
        &'a self,
        batch: &'a [ComparisonRequest],
    ) -> BoxFuture<'a, Result<Vec<VersionedVerdict>, JudgeError>> {
        Box::pin(self.judge_batch(batch.to_vec()))
    }
}

fn serve(mut judge: Box<dyn Judge>, commands: Receiver<JudgeCommand>) {
    while let Ok(JudgeCommand { batch, reply }) = commands.recv() {
        if reply.is_closed() {
            // Abandoned while queued behind a batch that timed out.
            continue;
        }
        // A judge that panicked is never used again, so its state does not matter.
        let judged = catch_unwind(AssertUnwindSafe(|| judge_batch(&mut *judge, &batch)));
        drop(batch);
        match judged {
            // The caller may have abandoned the batch; the thread continues.
            Ok(judged) => drop(reply.send(Ok(judged))),
            Err(panic) => {
                // Closes the channel first, so that no further command is queued without a reply.
                drop(commands);
                drop(reply.send(Err(message_of(&*panic))));
                return;
            }
        }
    }
}

/// Serves with a rebuilt judge. If the rebuild fails, fails the first batch and returns.
fn rebuild_and_serve(rebuild: &Rebuild, commands: Receiver<JudgeCommand>) {
    let reason = match catch_unwind(AssertUnwindSafe(|| rebuild())) {
        Ok(Ok(judge)) => return serve(judge, commands),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => message_of(&*panic),
    };
    if let Ok(JudgeCommand { reply, .. }) = commands.recv() {
        let error = JudgeError::new(format!("it could not be rebuilt: {reason}"));
        drop(commands);
        drop(reply.send(Ok(Err(error))));
    }
}

fn judge_batch(
    judge: &mut dyn Judge,
    batch: &[ComparisonRequest],
) -> Result<Vec<VersionedVerdict>, JudgeError> {
    let comparisons: Vec<_> = batch.iter().map(ComparisonRequest::comparison).collect();
    let version = judge.version();
    let scored = judge.judge_scored(&comparisons)?.into_iter();
    Ok(scored
        .map(|scored| VersionedVerdict {
            scores: scored.scores,
            ..VersionedVerdict::new(scored.verdict, version)
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

    fn request() -> ComparisonRequest {
        ComparisonRequest::new(Arc::new(pair(0, &["a", "b"])), 0, 1)
    }

    #[tokio::test]
    async fn the_judge_runs_on_its_own_thread_which_ends_with_the_replica() {
        let (sender, name) = std::sync::mpsc::channel();
        let thread = start(
            FakeJudge::answering(move |_| {
                sender
                    .send(thread::current().name().map(str::to_owned))
                    .unwrap();
                preferred(0.25)
            }),
            None,
        );
        let answers = thread.judge(&[request()]).await.expect("it answers");
        let expected = VersionedVerdict::new(preferred(0.25), JudgeVersion(7));
        assert_eq!(answers, [expected]);
        drop(thread);
        assert_eq!(name.recv().unwrap().as_deref(), Some("preference-judge"));
        assert!(name.recv().is_err(), "the judge is dropped");
    }

    #[tokio::test]
    async fn a_panic_without_a_rebuild_function_kills_the_replica() {
        let thread = start(
            FakeJudge::new(|batch| panic!("{} are too many", batch.len())),
            None,
        );
        for reason in ["it panicked: 1 are too many", "it panicked earlier"] {
            let error = thread.judge(&[request()]).await.expect_err("it panicked");
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (JudgeErrorKind::Dead, reason)
            );
        }
    }

    #[tokio::test]
    async fn a_judge_that_panicked_is_rebuilt_for_the_next_batch() {
        let mut builds = 0;
        let build = Mutex::new(move || {
            builds += 1;
            match builds {
                1 => Err(JudgeError::new("no memory")),
                _ => Ok(Box::new(FakeJudge::answering(|_| preferred(0.75))) as Box<dyn Judge>),
            }
        });
        let rebuild: Rebuild = Arc::new(move || (*build.lock().unwrap())());
        let thread = start(FakeJudge::new(|_| panic!("oh")), Some(rebuild));
        let mut failures = Vec::new();
        let answers = loop {
            match thread.judge(&[request()]).await {
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
                    "it could not be rebuilt: no memory".to_owned()
                ),
            ]
        );
        assert_eq!(answers[0].verdict, preferred(0.75));
    }
}
