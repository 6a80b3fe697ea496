//! Names of a run on the server: its streams, subjects and buckets. All contain the run's name, so that runs which
//! share a server do not interfere.

/// Name of a stream's durable consumer, which all receivers share; each message goes to one of them.
pub(crate) const CONSUMER: &str = "readers";

/// Name of the dead-letter stream.
pub(crate) const DEAD_LETTERS: &str = "dead letters";

/// Name of the registry's bucket.
const REGISTRY: &str = "registry";

/// Name of the weight store's bucket.
const WEIGHTS: &str = "weights";

/// The names of one run.
#[derive(Debug, Clone)]
pub(crate) struct RunNames(String);

impl RunNames {
    /// Names of the run named `run`.
    pub(crate) fn of(run: &str) -> Self {
        Self(run.to_owned())
    }

    /// Name of the stream `part`.
    pub(crate) fn stream(&self, part: &str) -> String {
        format!("agon-{}-{}", self.0, part.replace(' ', "-"))
    }

    /// Subject of the messages of the stream `part`.
    pub(crate) fn subject(&self, part: &str) -> String {
        self.stream(part).replacen('-', ".", 1)
    }

    /// Subject of the dead letters of the stream `part`.
    pub(crate) fn dead_letters_of(&self, part: &str) -> String {
        let prefix = self.subject(DEAD_LETTERS);
        format!("{prefix}.{}", part.replace(' ', "-"))
    }

    /// Name of the registry's bucket.
    pub(crate) fn registry(&self) -> String {
        self.stream(REGISTRY)
    }

    /// Name of the stream behind the registry's bucket.
    pub(crate) fn registry_stream(&self) -> String {
        format!("KV_{}", self.registry())
    }

    /// Subject of the registry's entry `key`.
    pub(crate) fn registry_subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.registry())
    }

    /// Name of the weight store's bucket.
    pub(crate) fn weights(&self) -> String {
        self.stream(WEIGHTS)
    }

    /// Name of the stream behind the weight store's bucket.
    pub(crate) fn weights_stream(&self) -> String {
        format!("OBJ_{}", self.weights())
    }

    /// Prefix of the subjects on which the processes of a role receive the server's answers.
    pub(crate) fn inbox(&self, role: &str) -> String {
        format!("{}.{role}", self.inboxes())
    }

    /// Prefix of the subjects on which all processes of the run receive the server's answers.
    pub(crate) fn inboxes(&self) -> String {
        format!("_INBOX.agon.{}", self.0)
    }
}
