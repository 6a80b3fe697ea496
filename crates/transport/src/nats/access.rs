//! Permissions of each role of a run on the server, for the server's configuration.

use crate::nats::names::{CONSUMER, DEAD_LETTERS, RunNames};

/// Access of a role to a run, from which its permissions follow. Everything that is not listed is refused by the server.
#[derive(Debug, Clone, Copy)]
pub struct RoleAccess {
    /// Name of the role, with which its processes connect: "learner" for the leader.
    pub role: &'static str,
    /// Whether it leads the run: creates, inspects and removes all of the run's streams, and publishes weights.
    pub leads: bool,
    /// Streams from which it receives.
    pub receives: &'static [&'static str],
    /// Streams to which it sends; `STREAM.STAGE` where several stages send to the stream, each in its own name.
    pub sends: &'static [&'static str],
    /// Keys of the registry that it writes, with NATS' wildcards.
    pub writes: &'static [&'static str],
    /// Whether it reads weights and the model's files.
    pub fetches_weights: bool,
}

/// Subjects that a user of the server may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    /// Subjects to which it may publish.
    pub publish: Vec<String>,
    /// Subjects to which it may subscribe.
    pub subscribe: Vec<String>,
}

impl RoleAccess {
    /// The role's permissions in the run named `run`, whose streams are `streams`.
    #[must_use]
    pub fn permissions(&self, run: &str, streams: &[&str]) -> Permissions {
        let names = RunNames::of(run);
        let mut publish = if self.leads {
            administration(&names, streams)
        } else {
            self.participation(&names, streams)
        };
        for stream in self.receives {
            let queue = names.stream(stream);
            publish.push(format!("$JS.API.CONSUMER.MSG.NEXT.{queue}.{CONSUMER}"));
            publish.push(format!("$JS.ACK.{queue}.{CONSUMER}.>"));
            // With the server's domain and account before the stream, as newer servers have it.
            publish.push(format!("$JS.ACK.*.*.{queue}.{CONSUMER}.>"));
            publish.push(names.dead_letters_of(stream));
        }
        publish.extend(self.sends.iter().map(|stream| names.subject(stream)));
        publish.extend(self.writes.iter().map(|key| names.registry_subject(key)));
        Permissions {
            publish,
            // The leader's credentials also serve to look at the run.
            subscribe: vec![match self.leads {
                true => format!("{}.>", names.inboxes()),
                false => format!("{}.>", names.inbox(self.role)),
            }],
        }
    }

    /// Requests of a process that joins or watches a run.
    fn participation(&self, names: &RunNames, streams: &[&str]) -> Vec<String> {
        let mut publish = Vec::new();
        for stream in streams {
            let queue = names.stream(stream);
            publish.push(format!("$JS.API.STREAM.INFO.{queue}"));
            publish.push(format!("$JS.API.CONSUMER.INFO.{queue}.{CONSUMER}"));
        }
        let dead_letters = names.stream(DEAD_LETTERS);
        publish.push(format!("$JS.API.STREAM.INFO.{dead_letters}"));
        publish.extend(reading(&names.registry_stream()));
        if self.fetches_weights {
            publish.extend(reading(&names.weights_stream()));
        } else {
            let weights = names.weights_stream();
            publish.push(format!("$JS.API.STREAM.INFO.{weights}"));
        }
        publish
    }
}

/// Requests that read the bucket behind a stream.
fn reading(stream: &str) -> Vec<String> {
    [
        "$JS.API.STREAM.INFO.{}",
        "$JS.API.STREAM.MSG.GET.{}",
        "$JS.API.DIRECT.GET.{}",
        "$JS.API.DIRECT.GET.{}.>",
        "$JS.API.CONSUMER.CREATE.{}",
        "$JS.API.CONSUMER.CREATE.{}.>",
        "$JS.API.CONSUMER.INFO.{}.*",
        "$JS.API.CONSUMER.DELETE.{}.*",
        "$JS.FC.{}.>",
    ]
    .iter()
    .map(|subject| subject.replace("{}", stream))
    .collect()
}

/// Requests of the leader: everything about the run's own streams.
fn administration(names: &RunNames, streams: &[&str]) -> Vec<String> {
    let mut publish = Vec::new();
    let queues = streams.iter().map(|stream| names.stream(stream));
    let kept = [
        names.stream(DEAD_LETTERS),
        names.registry_stream(),
        names.weights_stream(),
    ];
    for stream in queues.chain(kept) {
        let requests = [
            "$JS.API.STREAM.*.{}",
            "$JS.API.STREAM.MSG.*.{}",
            "$JS.API.DIRECT.GET.{}",
            "$JS.API.DIRECT.GET.{}.>",
            "$JS.API.CONSUMER.*.{}",
            "$JS.API.CONSUMER.*.{}.>",
            "$JS.API.CONSUMER.DURABLE.CREATE.{}.>",
            "$JS.FC.{}.>",
        ];
        publish.extend(
            requests
                .iter()
                .map(|subject| subject.replace("{}", &stream)),
        );
    }
    publish.push(names.registry_subject(">"));
    publish.push(format!("$O.{}.>", names.weights()));
    publish
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAMS: [&str; 2] = ["prompts", "dropped prompts"];

    fn role(leads: bool) -> RoleAccess {
        RoleAccess {
            role: "actor",
            leads,
            receives: &["prompts"],
            sends: &["dropped prompts.actor"],
            writes: &["heartbeat.actor.>"],
            fetches_weights: true,
        }
    }

    /// Whether a subject with wildcards allows another.
    fn allows(pattern: &str, subject: &str) -> bool {
        let (mut pattern, mut subject) = (pattern.split('.'), subject.split('.'));
        loop {
            match (pattern.next(), subject.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (Some(one), Some(other)) if one == other => {}
                _ => return false,
            }
        }
    }

    #[test]
    fn a_role_may_publish_what_it_sends_and_nothing_that_the_leader_publishes() {
        let joined = role(false).permissions("one", &STREAMS);
        let leader = role(true).permissions("one", &STREAMS);
        let may = |permissions: &Permissions, subject: &str| {
            permissions.publish.iter().any(|one| allows(one, subject))
        };
        for subject in [
            "agon.one-dropped-prompts.actor",
            "agon.one-dead-letters.prompts",
            "$KV.agon-one-registry.heartbeat.actor.a",
            "$JS.API.CONSUMER.MSG.NEXT.agon-one-prompts.readers",
            "$JS.ACK.agon-one-prompts.readers.1.2.3.4.5",
            "$JS.API.DIRECT.GET.OBJ_agon-one-weights.$O.agon-one-weights.M.x",
        ] {
            assert!(may(&joined, subject), "{subject}");
            assert!(may(&leader, subject), "{subject}");
        }
        for subject in [
            "$KV.agon-one-registry.run",
            "$KV.agon-one-registry.weights",
            "$KV.agon-one-registry.learner",
            "$O.agon-one-weights.C.x",
            "$O.agon-one-weights.M.x",
            "$JS.API.STREAM.CREATE.agon-one-prompts",
            "$JS.API.STREAM.DELETE.OBJ_agon-one-weights",
            "$JS.API.STREAM.PURGE.KV_agon-one-registry",
        ] {
            assert!(!may(&joined, subject), "{subject}");
            assert!(may(&leader, subject), "{subject}");
        }
        for subject in [
            "agon.one-prompts",
            "agon.one-dropped-prompts",
            "agon.one-dropped-prompts.preference",
            "agon.other-dropped-prompts.actor",
            "$KV.agon-other-registry.heartbeat.actor.a",
            "$JS.API.CONSUMER.MSG.NEXT.agon-one-dropped-prompts.readers",
            "_INBOX.agon.one.actor.x",
        ] {
            assert!(!may(&joined, subject), "{subject}");
        }
        assert!(!may(&leader, "$JS.API.STREAM.DELETE.agon-other-prompts"));
        assert_eq!(joined.subscribe, ["_INBOX.agon.one.actor.>"]);
        assert_eq!(leader.subscribe, ["_INBOX.agon.one.>"]);
    }
}
