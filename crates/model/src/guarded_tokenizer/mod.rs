//! A tokenizer of the tokenizers library, whose `tokenizer.json` may be untrusted.
//!
//! Such a file is a program: it names regular expressions, replacements and tables that the library runs on every text.
//! Promises that loading and use return an error that names the file instead of a panic, end within a deadline, and need
//! memory in proportion to the text. What a program computes is not judged.

mod inspection;
mod linear_regex;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tokenizers::{AddedToken, Encoding};

use crate::{
    error::ModelError,
    input_file::{self, MAX_TOKENIZER_BYTES},
    shards::check_not_lfs_pointer,
};
use inspection::Inspection;
use panic_guard::guarded;

/// Deadline of loading a tokenizer and of trying it out.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
/// Deadline of one use of a tokenizer that may take more than linear time.
const USE_DEADLINE: Duration = Duration::from_secs(20);
/// Stack of the threads on which tokenizers run, in bytes.
const STACK_BYTES: usize = 16 << 20;
/// Texts on which a tokenizer is tried when it is loaded, and how often each is repeated.
const PROBES: [(&str, usize); 8] = [
    ("", 1),
    ("a", 1),
    ("a", 300),
    (" ", 300),
    ("\n", 300),
    ("Hello, world! It's 12345. ", 20),
    ("naïve 日本語 ﷺ é \u{301}\u{200d}👩‍👩‍👧 ", 20),
    ("\0\t\u{ad}\u{feff}", 20),
];

/// A tokenizer with the path of its file. Clones share the data.
#[derive(Clone)]
pub(crate) struct GuardedTokenizer {
    tokenizer: Arc<tokenizers::Tokenizer>,
    path: Arc<Path>,
    /// Deadline of one use; `None` if every use takes linear time.
    deadline: Option<Duration>,
    /// Whether a use has missed its deadline and still runs.
    is_stuck: Arc<AtomicBool>,
}

/// Reason why a use of a tokenizer has no result.
enum Failure {
    /// The library returned this error.
    Refused(tokenizers::Error),
    /// The library panicked or did not finish.
    Broken(String),
}

impl GuardedTokenizer {
    /// Loads the file at `path`, without its truncation and padding, and tries it out.
    ///
    /// # Errors
    /// When it cannot be read, is not a `tokenizer.json`, would need far more memory than the texts have, makes the
    /// library panic, or does not finish.
    pub(crate) fn load(path: &Path) -> Result<Self, ModelError> {
        let bytes = input_file::read(path, MAX_TOKENIZER_BYTES)?;
        check_not_lfs_pointer(path, &bytes)?;
        let malformed = |reason: String| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let inspection = Inspection::of(&bytes).map_err(malformed)?;
        let loaded = within(LOAD_DEADLINE, move || load(&bytes)).map_err(malformed)?;
        Ok(Self {
            tokenizer: Arc::new(loaded.map_err(malformed)?),
            path: path.into(),
            deadline: (!inspection.is_linear).then_some(USE_DEADLINE),
            is_stuck: Arc::default(),
        })
    }

    /// Encodes a text, with the special tokens of the post-processor or without.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text, panics or does not finish.
    pub(crate) fn encode(
        &self,
        text: &str,
        with_special_tokens: bool,
    ) -> Result<Encoding, ModelError> {
        let result = match self.deadline {
            None => self.run(|tokenizer| tokenizer.encode_fast(text, with_special_tokens)),
            Some(deadline) => {
                let text = text.to_owned();
                self.run_within(deadline, move |tokenizer| {
                    tokenizer.encode_fast(text, with_special_tokens)
                })
            }
        };
        result.map_err(|failure| match failure {
            Failure::Refused(error) => {
                let path = self.path.display();
                ModelError::Tokens {
                    reason: format!("{path} failed to split a text into tokens: {error}"),
                }
            }
            Failure::Broken(reason) => self.broken(&reason),
        })
    }

    /// Ids of a text, as [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub(crate) fn ids(
        &self,
        text: &str,
        with_special_tokens: bool,
    ) -> Result<Vec<u32>, ModelError> {
        let encoding = self.encode(text, with_special_tokens)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of these ids; `None` when the decoder fails, panics or does not finish.
    pub(crate) fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Option<String> {
        let result = match self.deadline {
            None => self.run(|tokenizer| tokenizer.decode(ids, skip_special_tokens)),
            Some(deadline) => {
                let ids = ids.to_vec();
                self.run_within(deadline, move |tokenizer| {
                    tokenizer.decode(&ids, skip_special_tokens)
                })
            }
        };
        result.ok()
    }

    /// A tokenizer that `change` makes of this one, such as a copy with other settings.
    ///
    /// # Errors
    /// When the change fails or panics.
    pub(crate) fn changed(
        &self,
        change: impl FnOnce(&tokenizers::Tokenizer) -> Result<tokenizers::Tokenizer, tokenizers::Error>,
    ) -> Result<Self, String> {
        let changed = guarded(|| change(&self.tokenizer))?;
        Ok(Self {
            tokenizer: Arc::new(changed.map_err(|error| error.to_string())?),
            ..self.clone()
        })
    }

    /// Id of a token.
    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Token of an id.
    pub(crate) fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Vocabulary of the model, without added tokens.
    pub(crate) fn vocabulary(&self) -> HashMap<String, u32> {
        self.tokenizer.get_vocab(false)
    }

    /// Number of tokens, added ones included.
    pub(crate) fn token_count(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Added tokens by id.
    pub(crate) fn added_tokens(&self) -> HashMap<u32, AddedToken> {
        self.tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .collect()
    }

    /// Uses the tokenizer on this thread.
    fn run<T>(
        &self,
        run: impl FnOnce(&tokenizers::Tokenizer) -> Result<T, tokenizers::Error>,
    ) -> Result<T, Failure> {
        let result = guarded(|| run(&self.tokenizer)).map_err(Failure::Broken)?;
        result.map_err(Failure::Refused)
    }

    /// Uses the tokenizer on a thread of its own. After a missed deadline that thread is left alone, and every further
    /// use fails.
    fn run_within<T: Send + 'static>(
        &self,
        deadline: Duration,
        run: impl FnOnce(&tokenizers::Tokenizer) -> Result<T, tokenizers::Error> + Send + 'static,
    ) -> Result<T, Failure> {
        if self.is_stuck.load(Ordering::Relaxed) {
            return Err(Failure::Broken("it is still busy with another text".into()));
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        let result = within(deadline, move || run(&tokenizer)).map_err(|reason| {
            self.is_stuck.store(true, Ordering::Relaxed);
            Failure::Broken(reason)
        })?;
        result.map_err(Failure::Refused)
    }

    fn broken(&self, reason: &str) -> ModelError {
        ModelError::Malformed {
            path: PathBuf::from(&*self.path),
            reason: format!("the tokenizers library fails with it on a text: {reason}"),
        }
    }
}

/// Parses a `tokenizer.json` and tries the tokenizer out. That it cannot represent a text is no error.
fn load(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let malformed = |error: tokenizers::Error| {
        format!("it is not a tokenizer.json of the tokenizers library ({error})")
    };
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(malformed)?;
    tokenizer
        .with_padding(None)
        .with_truncation(None)
        .map_err(malformed)?;
    for (text, count) in PROBES {
        for with_special_tokens in [false, true] {
            let encoding = tokenizer.encode_fast(text.repeat(count), with_special_tokens);
            let Ok(encoding) = encoding else { continue };
            // A decoder may fail on what is no text.
            tokenizer.decode(encoding.get_ids(), true).ok();
            tokenizer.decode(encoding.get_ids(), false).ok();
        }
    }
    Ok(tokenizer)
}

/// Result of `run` on a thread of its own.
///
/// # Errors
/// When it panics, or does not finish by the deadline; then the thread is left alone.
fn within<T: Send + 'static>(
    deadline: Duration,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name("tokenizer".into())
        .stack_size(STACK_BYTES);
    let started = thread.spawn(move || {
        // After the deadline the receiver is gone.
        sender.send(guarded(run)).ok();
    });
    started.map_err(|error| format!("no thread can be started for it ({error})"))?;
    match receiver.recv_timeout(deadline) {
        Ok(result) => {
            result.map_err(|panic| format!("the tokenizers library fails with it: {panic}"))
        }
        Err(_) => Err(format!(
            "the tokenizers library does not finish with it within {} s",
            deadline.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests;
