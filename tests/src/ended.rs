//! What the program said and ended with.

/// A call of the program that is over.
#[derive(Debug, Clone)]
pub struct Ended {
    /// How it was called.
    pub call: String,
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ended {
    /// That it ended with `code` and that standard error holds each of `says`.
    ///
    /// # Panics
    /// When it did not: with everything it said.
    #[track_caller]
    pub fn check(self, code: i32, says: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "exit code of\n{}", self.words());
        for expected in says {
            assert!(
                self.err.contains(expected),
                "standard error should say {expected:?}:\n{}",
                self.words()
            );
        }
        self
    }

    /// That it ended well.
    ///
    /// # Panics
    /// When it did not: with everything it said.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.check(0, &[])
    }

    /// That standard error holds no sign of a panic: mistakes of users are told in sentences.
    ///
    /// # Panics
    /// When it does.
    #[track_caller]
    pub fn without_panic(self) -> Self {
        assert!(!self.err.contains("panicked at"), "{}", self.words());
        self
    }

    /// The lines of standard output, each read as JSON.
    ///
    /// # Panics
    /// When one is not.
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let read = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.out.lines().map(read).collect()
    }

    fn words(&self) -> String {
        format!(
            "{}\n--- code {:?}, standard output:\n{}\n--- standard error:\n{}",
            self.call, self.code, self.out, self.err
        )
    }
}
