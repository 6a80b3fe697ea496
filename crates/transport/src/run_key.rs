//! The key of a run. Its leader signs the run's record and the announcements of weights with the seed; other processes
//! have only the public key and refuse what is not signed with it. So a client of the server that may sample or label
//! cannot publish weights, whatever the server lets it write.

use std::path::{Path, PathBuf};

use nkeys::{KeyPair, KeyPairType};
use settings::JetStreamSettings;

use crate::error::TransportError;
use crate::nats::{is_set, secret};

/// Length of a signature in bytes.
const SIGNATURE_BYTES: usize = 64;

/// First byte of a value without a signature.
const UNSIGNED: u8 = 0;

/// First byte of a value that begins with a signature.
const SIGNED: u8 = 1;

/// A new pair of keys, in the text form of NATS' nkeys.
#[derive(Clone)]
pub struct NewKey {
    /// The secret half.
    pub seed: String,
    /// The public half.
    pub public: String,
}

impl NewKey {
    /// A key that identifies a client of the server.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn client() -> Result<Self, TransportError> {
        Self::of(&KeyPair::new(KeyPairType::User))
    }

    /// A key of a run.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn run() -> Result<Self, TransportError> {
        Self::of(&KeyPair::new(KeyPairType::Service))
    }

    fn of(pair: &KeyPair) -> Result<Self, TransportError> {
        let seed = pair.seed().map_err(|error| TransportError::Foreign {
            what: "a new key".into(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            seed,
            public: pair.public_key(),
        })
    }

    /// The key whose seed is in the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read or holds no seed.
    pub fn read(path: &Path) -> Result<Self, TransportError> {
        let seed = secret(path)?.unwrap_or_default();
        let pair = KeyPair::from_seed(&seed).map_err(|error| TransportError::Unreadable {
            path: path.to_owned(),
            reason: format!("it must hold the seed of an nkey: {error}"),
        })?;
        Self::of(&pair)
    }
}

impl std::fmt::Debug for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NewKey({})", self.public)
    }
}

/// The key of a run as this process has it.
#[derive(Debug, Clone)]
pub(crate) struct RunKey {
    run: String,
    path: PathBuf,
    /// `None` if the settings name no key: then nothing is signed, and no signature is checked.
    pair: Option<KeyPair>,
}

/// Reason why a value is not the leader's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unauthentic {
    /// Another form.
    #[error("another build has written it")]
    Form,
    /// No signature.
    #[error("it is not signed")]
    Unsigned,
    /// The signature is of another key, run, entry or value.
    #[error("its signature is not of this run's key")]
    Signature,
}

impl RunKey {
    /// The key that the settings name, of the run named `run`.
    ///
    /// # Errors
    /// When its file cannot be read or holds neither a seed nor a public key of a run.
    pub(crate) fn read(settings: &JetStreamSettings, run: &str) -> Result<Self, TransportError> {
        let path = settings.run_key_path.clone();
        let pair = match secret(&path)? {
            None => None,
            Some(text) => Some(parse(&text).ok_or_else(|| TransportError::Unreadable {
                path: path.clone(),
                reason: "it must hold the seed (SV…, for the learner) or the public key (V…) of a run key, as agon \
                         nats-config writes them"
                    .into(),
            })?),
        };
        let run = run.to_owned();
        Ok(Self { run, path, pair })
    }

    /// Checks that this process can sign, if the run has a key.
    ///
    /// # Errors
    /// When it has only the public key.
    pub(crate) fn require_seed(&self) -> Result<(), TransportError> {
        match &self.pair {
            Some(pair) if pair.seed().is_err() => Err(TransportError::Unreadable {
                path: self.path.clone(),
                reason: "it holds the public key: the learner signs with the seed, so name its file with \
                         transport.run_key_path"
                    .into(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether signatures are made and checked.
    pub(crate) fn is_set(&self) -> bool {
        is_set(&self.path)
    }

    /// The value of the entry `name` that holds `content`, signed if this process has the seed.
    pub(crate) fn seal(&self, name: &str, content: &[u8]) -> Vec<u8> {
        let signed = self.signed(name, content);
        let signature = self.pair.as_ref().and_then(|pair| pair.sign(&signed).ok());
        match signature {
            Some(signature) => [&[SIGNED], signature.as_slice(), content].concat(),
            None => [&[UNSIGNED], content].concat(),
        }
    }

    /// The content of the entry `name`, whose value was made by [`Self::seal`].
    ///
    /// # Errors
    /// When the settings name a key and the value is not signed with it.
    pub(crate) fn open(&self, name: &str, value: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        let (signature, content) = match value.split_first() {
            Some((&UNSIGNED, content)) => (None, content),
            Some((&SIGNED, rest)) => {
                let (signature, content) = rest
                    .split_at_checked(SIGNATURE_BYTES)
                    .ok_or(Unauthentic::Form)?;
                (Some(signature), content)
            }
            _ => return Err(Unauthentic::Form),
        };
        if let Some(pair) = &self.pair {
            let signature = signature.ok_or(Unauthentic::Unsigned)?;
            let verified = pair.verify(&self.signed(name, content), signature);
            verified.map_err(|_| Unauthentic::Signature)?;
        }
        Ok(content.to_owned())
    }

    /// The error of a value that is not the leader's.
    pub(crate) fn refuse(&self, what: &str, reason: Unauthentic) -> TransportError {
        match reason {
            Unauthentic::Form => TransportError::Foreign {
                what: what.to_owned(),
                reason: format!("{reason}; run one build everywhere"),
            },
            Unauthentic::Unsigned | Unauthentic::Signature => TransportError::Unauthentic {
                what: what.to_owned(),
                reason: reason.to_string(),
                path: self.path.clone(),
            },
        }
    }

    /// The signed bytes: the value, bound to its run and its entry.
    fn signed(&self, name: &str, content: &[u8]) -> Vec<u8> {
        let head = format!("agon run entry\0{}\0{name}\0", self.run);
        [head.as_bytes(), content].concat()
    }
}

/// The key of a run in this text.
fn parse(text: &str) -> Option<KeyPair> {
    let pair = KeyPair::from_seed(text).or_else(|_| KeyPair::from_public_key(text));
    pair.ok()
        .filter(|pair| pair.key_pair_type() == KeyPairType::Service)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(run: &str, text: Option<&str>) -> RunKey {
        RunKey {
            run: run.to_owned(),
            path: "key".into(),
            pair: text.map(|text| parse(text).expect("a key")),
        }
    }

    #[test]
    fn only_the_seed_of_the_run_key_signs_what_its_public_key_accepts() {
        let (ours, other) = (NewKey::run().expect("a key"), NewKey::run().expect("a key"));
        let leader = key("one", Some(&ours.seed));
        let reader = key("one", Some(&ours.public));
        let value = leader.seal("weights", b"manifest");
        for accepts in [&reader, &leader, &key("one", None)] {
            assert_eq!(
                accepts.open("weights", &value).as_deref(),
                Ok(&b"manifest"[..])
            );
        }
        let changed = |at: usize| {
            let mut changed = value.clone();
            changed[at] ^= 1;
            changed
        };
        let cases = [
            (reader.open("run", &value), Unauthentic::Signature),
            (
                key("two", Some(&ours.public)).open("weights", &value),
                Unauthentic::Signature,
            ),
            (
                key("one", Some(&other.public)).open("weights", &value),
                Unauthentic::Signature,
            ),
            (reader.open("weights", &changed(5)), Unauthentic::Signature),
            (reader.open("weights", &changed(70)), Unauthentic::Signature),
            (reader.open("weights", &changed(0)), Unauthentic::Unsigned),
            (reader.open("weights", &[0]), Unauthentic::Unsigned),
            (
                reader.open("weights", &reader.seal("weights", b"manifest")),
                Unauthentic::Unsigned,
            ),
            (reader.open("weights", &value[..40]), Unauthentic::Form),
            (reader.open("weights", b"{}"), Unauthentic::Form),
            (reader.open("weights", b""), Unauthentic::Form),
        ];
        for (opened, expected) in cases {
            assert_eq!(opened, Err(expected));
        }
        let unsigned = key("one", None).seal("weights", b"manifest");
        assert_eq!(
            reader.open("weights", &unsigned),
            Err(Unauthentic::Unsigned)
        );
        let open = key("one", None).open("weights", &unsigned);
        assert_eq!(open.as_deref(), Ok(&b"manifest"[..]));
    }

    #[test]
    fn a_key_of_another_kind_or_half_is_refused() {
        let client = NewKey::client().expect("a key");
        for text in [client.seed.as_str(), &client.public, "", "SV", "x y"] {
            assert!(parse(text).is_none(), "{text}");
        }
        let run = NewKey::run().expect("a key");
        assert!(key("one", Some(&run.seed)).require_seed().is_ok());
        assert!(key("one", None).require_seed().is_ok());
        let error = key("one", Some(&run.public)).require_seed();
        let error = error.expect_err("a public key").to_string();
        assert!(error.contains("public key"), "{error}");
        assert!(!format!("{run:?}").contains(&run.seed));
    }
}
