//! The thread on which the judge computes, so that no async task ever waits for it on its own thread.
//!
//! One batch is judged at a time. A panic ends the thread, and is told to whoever waits for the batch.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};
use messages::Pair;
use tokio::sync::oneshot;

use crate::panel::{Answer, Panel};
use crate::{JudgeError, PreferenceError};

/// The thread, from outside. Dropping it ends the thread after the batch it is at.
pub(crate) struct JudgeThread {
    judge: String,
    is_antisymmetric: bool,
    commands: Sender<Command>,
    thread: JoinHandle<()>,
}

enum Command {
    Judge {
        pairs: Vec<Arc<Pair>>,
        reply: oneshot::Sender<Reply>,
    },
}

/// What became of a batch, or the message of the panic that ended the thread.
type Reply = Result<Result<Answer, JudgeError>, String>;

impl JudgeThread {
    /// Starts the thread `preference-judge`, which owns `panel` from here on.
    pub(crate) fn start(panel: Panel) -> Result<Self, PreferenceError> {
        let judge = panel.judge_ref().name().to_owned();
        let is_antisymmetric = panel.judge_ref().is_antisymmetric();
        let (commands, received) = bounded(1);
        let thread = thread::Builder::new()
            .name("preference-judge".into())
            .spawn(move || serve(panel, received))
            .map_err(|source| PreferenceError::Thread {
                judge: judge.clone(),
                source,
            })?;
        Ok(Self {
            judge,
            is_antisymmetric,
            commands,
            thread,
        })
    }

    /// The judge's name.
    pub(crate) fn judge_name(&self) -> &str {
        &self.judge
    }

    /// Whether the judge is antisymmetric by construction.
    pub(crate) fn is_antisymmetric(&self) -> bool {
        self.is_antisymmetric
    }

    /// Has the batch judged. The thread has let go of `pairs` when the answer is there.
    ///
    /// # Errors
    /// The outer error when the judge panicked, now or before; the inner one when it failed.
    pub(crate) async fn judge(
        &mut self,
        pairs: Vec<Arc<Pair>>,
    ) -> Result<Result<Answer, JudgeError>, PreferenceError> {
        let (reply, answer) = oneshot::channel();
        let ended = || "its thread has ended without an answer".to_owned();
        // There is room: the batch before has been answered. A thread that is gone drops `reply`.
        drop(self.commands.try_send(Command::Judge { pairs, reply }));
        let reply = answer.await.unwrap_or_else(|_| Err(ended()));
        reply.map_err(|message| PreferenceError::JudgePanicked {
            judge: self.judge.clone(),
            message,
        })
    }

    /// Ends the thread and waits until the judge and all that it holds are gone.
    pub(crate) async fn finish(self) {
        drop(self.commands);
        let thread = self.thread;
        let ended = tokio::task::spawn_blocking(move || thread.join()).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::warn!(judge = self.judge, "the judge panicked when it was let go");
        }
    }
}

fn serve(mut panel: Panel, commands: Receiver<Command>) {
    while let Ok(Command::Judge { pairs, reply }) = commands.recv() {
        // A panel that has panicked is never asked again, so it may be left in any state.
        let judged = catch_unwind(AssertUnwindSafe(|| panel.judge(&pairs)));
        drop(pairs);
        let judged = match judged {
            Ok(judged) => judged,
            Err(panic) => {
                // No more commands from here on, so that none is left lying without an answer.
                drop(commands);
                drop(reply.send(Err(message_of(&*panic))));
                return;
            }
        };
        if reply.send(Ok(judged)).is_err() {
            return;
        }
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{FakeJudge, pair, preferred};

    fn start(judge: FakeJudge) -> JudgeThread {
        JudgeThread::start(Panel::new(Box::new(judge), None, 64)).expect("a thread")
    }

    #[tokio::test]
    async fn the_judge_has_a_thread_of_its_own_which_ends_with_the_role() {
        let (told, name) = std::sync::mpsc::channel();
        let mut thread = start(FakeJudge::answering(move |_| {
            told.send(thread::current().name().map(str::to_owned))
                .unwrap();
            preferred(0.5)
        }));
        let pairs = vec![Arc::new(pair(0, &["a", "b"]))];
        let kept = Arc::clone(&pairs[0]);
        thread
            .judge(pairs)
            .await
            .expect("no panic")
            .expect("no failure");
        assert_eq!(
            Arc::strong_count(&kept),
            1,
            "the thread has let go of the pair"
        );
        thread.finish().await;
        assert_eq!(name.recv().unwrap().as_deref(), Some("preference-judge"));
        assert!(name.recv().is_err(), "the judge is gone");
    }

    #[tokio::test]
    async fn a_panic_is_told_at_once_and_ever_after() {
        let mut thread = start(FakeJudge::new(|batch| {
            panic!("{} are too many", batch.len())
        }));
        let batch = || vec![Arc::new(pair(0, &["a", "b"]))];
        let first = thread.judge(batch()).await.expect_err("it panicked");
        assert_eq!(
            first.to_string(),
            "judge pairs: the judge fake panicked: 1 are too many; start the service again with a new judge"
        );
        let second = thread
            .judge(batch())
            .await
            .expect_err("it is gone")
            .to_string();
        assert!(second.contains("ended without an answer"), "{second}");
        thread.finish().await;
    }
}
