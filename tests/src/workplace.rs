//! A directory of its own for one test, in which the program runs.

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

use crate::{Ended, agon_binary};

/// No call of the program in these tests takes near so long: one that does hangs.
const DEADLINE: Duration = Duration::from_secs(300);
/// Between two looks at something that is waited for.
const PAUSE: Duration = Duration::from_millis(5);

/// The root of the workspace.
pub fn workspace_root() -> &'static Path {
    let member = Path::new(env!("CARGO_MANIFEST_DIR"));
    member
        .parent()
        .expect("the tests are a member of a workspace")
}

/// Looks until `found` gives something.
///
/// # Panics
/// When it has given nothing for minutes: with `what` was waited for.
#[track_caller]
pub fn wait_until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}");
        thread::sleep(PAUSE);
    }
}

/// A fresh directory, removed when the value goes.
#[derive(Debug)]
pub struct Workplace {
    directory: TempDir,
    calls: AtomicUsize,
}

impl Default for Workplace {
    fn default() -> Self {
        Self::new()
    }
}

impl Workplace {
    /// A fresh one.
    ///
    /// # Panics
    /// When the system gives no temporary directory.
    pub fn new() -> Self {
        Self {
            directory: TempDir::new().expect("a temporary directory"),
            calls: AtomicUsize::new(0),
        }
    }

    /// The file or folder `name` in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file and says where.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// A copy of a folder of files, under `name`.
    ///
    /// # Panics
    /// When something cannot be copied.
    pub fn copy_of(&self, folder: &Path, name: &str) -> PathBuf {
        let to = self.path(name);
        fs::create_dir_all(&to).expect("a folder in a temporary directory");
        for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let from = entry.expect("an entry of a folder").path();
            let content = fs::read(&from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
            // Written anew, not copied: the original may be read-only.
            let file = to.join(from.file_name().expect("an entry has a name"));
            fs::write(file, content).expect("a file in a temporary directory");
        }
        to
    }

    /// Runs `agon` with these arguments to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ended {
        self.start(arguments).wait()
    }

    /// Starts `agon` with these arguments.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Running {
        let mut command = Command::new(agon_binary());
        command.args(arguments);
        self.start_command(command)
    }

    /// Starts a command that ends up as `agon`, here, with its words in files of their own.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_command(&self, mut command: Command) -> Running {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let [out, err] = ["out", "err"].map(|kind| self.path(&format!("call-{call}.{kind}")));
        let create = |path: &Path| File::create(path).expect("a file in a temporary directory");
        command
            .current_dir(self.directory.path())
            .env_remove("AGON_LOG")
            .stdin(std::process::Stdio::null())
            .stdout(create(&out))
            .stderr(create(&err));
        let call = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|e| panic!("{call}: {e}"));
        Running {
            child,
            call,
            out,
            err,
        }
    }
}

/// A call of the program that goes on. It is killed when the value goes before its end.
#[derive(Debug)]
pub struct Running {
    child: Child,
    call: String,
    out: PathBuf,
    err: PathBuf,
}

impl Running {
    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within minutes.
    pub fn wait(mut self) -> Ended {
        let what = format!("the end of {}", self.call);
        let status = wait_until(&what, || self.ended());
        Ended {
            call: self.call.clone(),
            code: status.code(),
            out: words(&self.out),
            err: words(&self.err),
        }
    }

    /// Waits until `found` gives something while the program goes on.
    ///
    /// # Panics
    /// When it ends before, or neither happens within minutes.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        wait_until(what, || {
            // Asked first: what it left at its very end counts too.
            let ended = self.ended();
            let found = found();
            assert!(
                found.is_some() || ended.is_none(),
                "{} ended with {ended:?} before {what}:\n{}",
                self.call,
                words(&self.err)
            );
            found
        })
    }

    /// The files with its words: standard output and standard error.
    pub fn files(&self) -> [PathBuf; 2] {
        [self.out.clone(), self.err.clone()]
    }

    /// What it said on standard error so far.
    pub fn err(&self) -> String {
        words(&self.err)
    }

    /// Asks it to stop, with SIGTERM.
    ///
    /// # Panics
    /// When there is nothing to ask any more.
    pub fn terminate(&self) {
        let kill = format!("kill -TERM {}", self.child.id());
        let status = Command::new("sh")
            .args(["-c", &kill])
            .status()
            .expect("a shell");
        assert!(status.success(), "{kill}: it was over already");
    }

    /// Ends it where it stands, with SIGKILL.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn kill(mut self) {
        self.child.kill().expect("one's own child can be killed");
        self.child
            .wait()
            .expect("one's own child can be waited for");
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .expect("one's own child can be waited for")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it is over, which is what is wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn words(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
