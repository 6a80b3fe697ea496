//! Output and exit code of a finished process.

/// Output and exit code of a finished process.
#[derive(Debug, Clone)]
pub struct ProcessOutput {
    /// The command line.
    pub call: String,
    /// Exit code; `None` if a signal terminated the process.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl ProcessOutput {
    /// Asserts the exit code and that standard error contains each of `fragments`.
    ///
    /// # Panics
    /// If not, with the whole output.
    #[track_caller]
    pub fn check(self, code: i32, fragments: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "exit code of\n{}", self.describe());
        for fragment in fragments {
            assert!(
                self.stderr.contains(fragment),
                "standard error lacks {fragment:?}:\n{}",
                self.describe()
            );
        }
        self
    }

    /// Asserts exit code 0.
    ///
    /// # Panics
    /// If it differs, with the whole output.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.check(0, &[])
    }

    /// Asserts that standard error contains no panic message: user errors must be reported as sentences.
    ///
    /// # Panics
    /// If it does.
    #[track_caller]
    pub fn without_panic(self) -> Self {
        assert!(!self.stderr.contains("panicked at"), "{}", self.describe());
        self
    }

    /// Parses every line of standard output as JSON.
    ///
    /// # Panics
    /// If a line is not JSON.
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.stdout.lines().map(parse).collect()
    }

    fn describe(&self) -> String {
        format!(
            "{}\n--- code {:?}, standard output:\n{}\n--- standard error:\n{}",
            self.call, self.code, self.stdout, self.stderr
        )
    }
}
