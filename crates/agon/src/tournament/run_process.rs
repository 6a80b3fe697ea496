//! Runs as processes of `agon train`, several at a time, each with a log file beside its run directory.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Instant,
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use telemetry::RunView;
use tokio::{
    process::{Child, Command},
    sync::watch,
    task::JoinSet,
};

use crate::{
    exit_code::{Code, UsageError},
    tournament::{files, plan::PlannedRun},
};

/// Bytes at the end of a failed run's log that are searched for its last line.
const LOG_TAIL: usize = 4096;

/// Runs processes, as many at a time as there are jobs, until a shutdown.
pub(super) struct RunQueue<'a> {
    jobs: usize,
    shutdown: &'a watch::Sender<bool>,
}

/// A run's process, ready to start.
struct RunCommand {
    name: String,
    /// The tournament's directory.
    root: PathBuf,
    directory: PathBuf,
    configuration: PathBuf,
    seed: u64,
}

/// Ending of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunEnding {
    Finished,
    Diverged,
    Interrupted,
}

impl<'a> RunQueue<'a> {
    pub(super) fn new(jobs: usize, shutdown: &'a watch::Sender<bool>) -> Self {
        Self { jobs, shutdown }
    }

    /// Runs all of `runs` that have not ended yet. Whether all have: not after a shutdown, for which running ones are
    /// saved.
    ///
    /// # Errors
    /// When a run's directory holds a run with other settings, or a run fails; the others are then ended as by a shutdown.
    pub(super) async fn run_all(&self, part: &str, runs: &[PlannedRun]) -> anyhow::Result<bool> {
        let mut pending = Vec::new();
        for run in runs {
            if !run.has_ended()? {
                pending.push(RunCommand::of(run));
            }
        }
        let (total, count) = (runs.len(), pending.len());
        if count > 0 {
            tracing::info!(part, runs = count, done = total - count, "runs to do");
        }
        let started = Instant::now();
        let mut waiting = pending.into_iter();
        let mut running = JoinSet::new();
        let mut ended = 0;
        let mut failure = None;
        loop {
            while running.len() < self.jobs && failure.is_none() && !*self.shutdown.borrow() {
                let Some(command) = waiting.next() else { break };
                running.spawn(command.run(self.shutdown.subscribe()));
            }
            let Some(joined) = running.join_next().await else {
                break;
            };
            match joined.context("the task of a run failed")? {
                Ok(RunEnding::Interrupted) => {}
                Ok(_) => {
                    ended += 1;
                    let each = started.elapsed().as_secs_f64() / f64::from(ended);
                    let left = count - ended as usize;
                    log_ended(part, [total - left, total], each * left as f64 / 60.0);
                }
                Err(error) => {
                    self.shutdown.send_replace(true);
                    failure.get_or_insert(error);
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(ended as usize == count),
        }
    }
}

impl PlannedRun {
    /// Whether the run has finished or diverged. A process that still runs it is detected by the run's own lock.
    ///
    /// # Errors
    /// When the directory holds a run with other settings.
    fn has_ended(&self) -> anyhow::Result<bool> {
        if self.diverged() {
            return Ok(true);
        }
        let Some(recorded) = files::read(&self.directory, "config.toml")? else {
            return Ok(false);
        };
        if recorded != self.resolved.toml {
            return Err(UsageError(format!(
                "{} holds a run with other settings: choose another tournament.name, or remove the directory",
                self.directory.display()
            ))
            .into());
        }
        let report = RunView::open(&self.directory)?
            .report()?
            .unwrap_or_default();
        Ok(report["finished"] == true)
    }

    /// Whether the run has ended by divergence.
    pub(super) fn diverged(&self) -> bool {
        self.directory.with_extension("diverged").exists()
    }
}

impl RunCommand {
    fn of(run: &PlannedRun) -> Self {
        Self {
            name: run.name.clone(),
            root: run.root.clone(),
            directory: run.directory.clone(),
            configuration: run.configuration.clone(),
            seed: run.seed,
        }
    }

    /// Runs the process to its end; a shutdown is passed on to it.
    async fn run(self, mut shutdown: watch::Receiver<bool>) -> anyhow::Result<RunEnding> {
        tracing::info!(run = self.name, "run started");
        let mut child = self.start()?;
        // Waiting would close it.
        let stdin = child.stdin.take();
        let requested = async {
            // Without a sender there is nothing to wait for.
            if shutdown.wait_for(|requested| *requested).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let status = tokio::select! {
            status = child.wait() => status,
            () = requested => {
                terminate(&child);
                let status = child.wait().await;
                let status = status.with_context(|| format!("failed to wait for {}", self.name))?;
                // A signal that comes before the run has begun ends it at once.
                return match status.signal() {
                    Some(signal) if signal == Signal::TERM.as_raw() => Ok(RunEnding::Interrupted),
                    _ => self.ending(status),
                };
            }
        };
        drop(stdin);
        let status = status.with_context(|| format!("failed to wait for {}", self.name))?;
        let ending = self.ending(status)?;
        if ending == RunEnding::Interrupted {
            tracing::warn!(
                run = self.name,
                "run was interrupted by a signal of its own"
            );
        }
        Ok(ending)
    }

    fn start(&self) -> anyhow::Result<Child> {
        let folder = self.directory.parent().context("a run is in a folder")?;
        files::create_folder(&self.root, folder.strip_prefix(&self.root)?)?;
        let output = files::append(&self.log())?;
        let errors = output.try_clone().context("failed to share the log")?;
        Command::new(std::env::current_exe().context("failed to find this binary")?)
            .arg("train")
            .arg(&self.configuration)
            .arg("--set")
            .arg(format!("run.seed={}", self.seed))
            .arg("--run-dir")
            .arg(&self.directory)
            .args(["--resume", "auto", "--end-with-stdin"])
            // Its end tells the run that this process is gone.
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(errors)
            // A signal of the terminal reaches this process, which passes it on once.
            .process_group(0)
            .spawn()
            .with_context(|| format!("failed to start {}", self.name))
    }

    fn log(&self) -> PathBuf {
        self.directory.with_extension("log")
    }

    fn ending(&self, status: ExitStatus) -> anyhow::Result<RunEnding> {
        let code = status.code();
        if status.success() {
            return Ok(RunEnding::Finished);
        }
        if code == Some(Code::Interrupted as i32) {
            return Ok(RunEnding::Interrupted);
        }
        if code == Some(Code::Diverged as i32) {
            let mark = self.directory.with_extension("diverged");
            fs::write(&mark, "").with_context(|| format!("failed to write {}", mark.display()))?;
            tracing::warn!(run = self.name, "run diverged");
            return Ok(RunEnding::Diverged);
        }
        let log = fs::read(self.log()).unwrap_or_default();
        let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL)..]);
        let last = tail.lines().rfind(|line| !line.trim().is_empty());
        bail!(
            "{} failed ({status}): {}; its log is {}",
            self.name,
            last.unwrap_or("it said nothing"),
            self.log().display()
        )
    }
}

/// Logs that a run has ended: how many of all have, and the minutes that the others will take.
fn log_ended(part: &str, [done, of]: [usize; 2], minutes: f64) {
    let minutes_left = format!("{minutes:.0}");
    tracing::info!(part, done, of, minutes_left, "run ended");
}

/// Asks the process to save and end.
fn terminate(child: &Child) {
    let id = child.id().and_then(|id| Pid::from_raw(id as i32));
    if let Some(id) = id {
        // It may have ended already.
        kill_process(id, Signal::TERM).ok();
    }
}
