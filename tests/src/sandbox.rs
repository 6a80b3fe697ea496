//! A temporary directory for one test, in which the program runs.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{ProcessOutput, agon_binary};

/// Timeout of every wait, far above the duration of any call: a call that exceeds it hangs.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Interval between two polls of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Root of the cargo workspace.
pub fn workspace_root() -> &'static Path {
    let member = Path::new(env!("CARGO_MANIFEST_DIR"));
    member
        .parent()
        .expect("the tests are a member of a workspace")
}

/// Polls until `poll` returns a value.
///
/// # Panics
/// If it does not within the timeout; the message names `what`.
#[track_caller]
pub fn wait_until<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(started.elapsed() < TIMEOUT, "timed out waiting for {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Creates a named pipe.
pub fn make_pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfifo");
}

/// A temporary directory, removed on drop.
#[derive(Debug)]
pub struct Sandbox {
    directory: TempDir,
    calls: AtomicUsize,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// Creates an empty sandbox.
    ///
    /// # Panics
    /// If no temporary directory can be created.
    pub fn new() -> Self {
        Self {
            directory: TempDir::new().expect("a temporary directory"),
            calls: AtomicUsize::new(0),
        }
    }

    /// Path of the file or folder `name` in the sandbox.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file and returns its path.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// Copies a folder of files into the sandbox as `name` and returns its path.
    ///
    /// # Panics
    /// If a file cannot be copied.
    pub fn copy_of(&self, folder: &Path, name: &str) -> PathBuf {
        let to = self.path(name);
        fs::create_dir_all(&to).expect("a folder in the sandbox");
        for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let from = entry.expect("a directory entry").path();
            let content = fs::read(&from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
            // Rewritten rather than copied: the original may be read-only.
            let file = to.join(from.file_name().expect("an entry has a name"));
            fs::write(file, content).expect("a file in a temporary directory");
        }
        to
    }

    /// Runs `agon` with these arguments to completion.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> ProcessOutput {
        self.start(arguments).wait()
    }

    /// Starts `agon` with these arguments.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: &[S]) -> RunningProcess {
        let mut command = Command::new(agon_binary());
        command.args(arguments);
        self.start_command(command)
    }

    /// Starts a command in the sandbox, with its output redirected to files.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_command(&self, mut command: Command) -> RunningProcess {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let [stdout, stderr] = ["out", "err"].map(|kind| self.path(&format!("call-{call}.{kind}")));
        let create = |path: &Path| File::create(path).expect("a file in a temporary directory");
        command
            .current_dir(self.directory.path())
            .env_remove("AGON_LOG")
            .stdin(std::process::Stdio::null())
            .stdout(create(&stdout))
            .stderr(create(&stderr));
        let call = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|e| panic!("{call}: {e}"));
        RunningProcess {
            child,
            call,
            stdout,
            stderr,
        }
    }
}

/// A running process; killed on drop.
#[derive(Debug)]
pub struct RunningProcess {
    child: Child,
    call: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl RunningProcess {
    /// Waits for the process to exit.
    ///
    /// # Panics
    /// If it does not exit within the timeout; the message has its standard error.
    #[track_caller]
    pub fn wait(mut self) -> ProcessOutput {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.exit_status() {
                break status;
            }
            let (call, stderr) = (&self.call, &self.stderr);
            assert!(
                started.elapsed() < TIMEOUT,
                "{call} does not exit:\n{}",
                read_lossy(stderr)
            );
            thread::sleep(POLL_INTERVAL);
        };
        ProcessOutput {
            call: self.call.clone(),
            code: status.code(),
            stdout: read_lossy(&self.stdout),
            stderr: read_lossy(&self.stderr),
        }
    }

    /// Polls until `poll` returns a value while the process runs.
    ///
    /// # Panics
    /// If the process exits before, or neither happens within the timeout.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
        wait_until(what, || {
            // Checked first, so that output written just before the exit is seen.
            let status = self.exit_status();
            let value = poll();
            assert!(
                value.is_some() || status.is_none(),
                "{} exited with {status:?} before {what}:\n{}",
                self.call,
                read_lossy(&self.stderr)
            );
            value
        })
    }

    /// Paths of the files with standard output and standard error.
    pub fn output_files(&self) -> [PathBuf; 2] {
        [self.stdout.clone(), self.stderr.clone()]
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// Sends SIGTERM.
    ///
    /// # Panics
    /// If the process has exited.
    pub fn terminate(&self) {
        let kill = format!("kill -TERM {}", self.child.id());
        let status = Command::new("sh")
            .args(["-c", &kill])
            .status()
            .expect("a shell");
        assert!(status.success(), "{kill}: the process has exited already");
    }

    /// Sends SIGKILL and waits for the exit.
    ///
    /// # Panics
    /// If the system refuses.
    pub fn kill(mut self) {
        self.child.kill().expect("a child process can be killed");
        self.child
            .wait()
            .expect("a child process can be waited for");
    }

    fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .expect("a child process can be waited for")
    }
}

impl Drop for RunningProcess {
    fn drop(&mut self) {
        // Errors mean that the process has exited already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
