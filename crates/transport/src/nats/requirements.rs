//! Requirements of a run on its server, checked when it connects, and the errors that a retry cannot fix, with their
//! remedies.

use std::time::Duration;

use async_nats::ServerInfo;
use settings::JetStreamSettings;

use crate::error::TransportError;

/// Oldest version of the server that has what a run uses: named consumers and direct reads.
const MIN_VERSION: [u64; 2] = [2, 9];

/// Least size of a message that the server must take: a chunk of the object store with its headers.
const MIN_PAYLOAD: usize = (512 << 10) + (16 << 10);

/// Errors of JetStream that stay until someone changes the server or the settings, by code.
const PERMANENT: [(u64, &str); 9] = [
    (10026, "raise the account's limit of consumers"),
    (10027, "raise the account's limit of streams"),
    (
        10035,
        "name credentials of an account that exists on the server",
    ),
    (10039, ENABLE_JETSTREAM),
    (
        10052,
        "the account restricts streams: allow the run's, which have no limit of bytes",
    ),
    (
        10058,
        "a stream of that name has another configuration: choose another run.name, or remove it",
    ),
    (
        10065,
        "another stream of the server has the run's subjects: choose another run.name, or remove it",
    ),
    (
        10074,
        "the server runs alone: set transport.replicas = 1, or connect to a cluster",
    ),
    (
        10076,
        "start the server with JetStream: nats-server -js, or jetstream {} in its configuration",
    ),
];

/// Remedy for a full store.
pub(crate) const MORE_STORAGE: &str =
    "give the server's JetStream more storage (max_file_store), or free some";

/// Remedy where the server has JetStream and the account of the client has not.
const ENABLE_JETSTREAM: &str = "enable JetStream for the account of this process's user";

/// Time for which a starting process accepts that JetStream does not answer.
const ABSENCE_AT_START: Duration = Duration::from_secs(3);

/// Checks what a server says of itself when a client connects.
///
/// # Errors
/// When it cannot carry a run; the message names what it lacks.
pub(crate) fn check(info: &ServerInfo, settings: &JetStreamSettings) -> Result<(), TransportError> {
    let lacks = |reason: String| {
        let url = settings.url.clone();
        Err(TransportError::Rejected { url, reason })
    };
    let version = version(&info.version);
    if version.is_some_and(|version| version < MIN_VERSION) {
        let [major, minor] = MIN_VERSION;
        return lacks(format!(
            "nats-server {} is too old: a run needs {major}.{minor} or newer",
            info.version
        ));
    }
    if !info.jetstream {
        return lacks(
            "the server runs without JetStream: start it with nats-server -js, or with jetstream {} in its \
             configuration"
                .into(),
        );
    }
    check_payload(info, settings, MIN_PAYLOAD)
}

/// Checks that the server takes messages of `bytes` bytes.
///
/// # Errors
/// When it does not.
pub(crate) fn check_payload(
    info: &ServerInfo,
    settings: &JetStreamSettings,
    bytes: usize,
) -> Result<(), TransportError> {
    if info.max_payload >= bytes {
        return Ok(());
    }
    Err(TransportError::Rejected {
        url: settings.url.clone(),
        reason: format!(
            "the server takes messages of at most {} bytes and this run has some of up to {bytes}: set max_payload: \
             {}MB in its configuration",
            info.max_payload,
            bytes.div_ceil(1 << 20).max(8)
        ),
    })
}

/// Major and minor number of a version; `None` if it is not one, as of a build of one's own.
fn version(text: &str) -> Option<[u64; 2]> {
    let mut numbers = text.trim_start_matches('v').split('.');
    Some([numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?])
}

/// Remedy for a connection that the server ends at once, if trying again cannot help.
pub(crate) fn remedy_of_connection(failure: &str) -> Option<&'static str> {
    let failure = failure.to_ascii_lowercase();
    if failure.contains("requires headers") {
        return Some("remove no_header_support from the server's configuration");
    }
    let is_unknown = ["authorization violation", "authentication"]
        .iter()
        .any(|phrase| failure.contains(phrase));
    is_unknown.then_some(
        "the server does not know this user: name the key of this process's role with transport.nkey_path, or other \
         credentials with transport.credentials_path, transport.token_path or transport.password_path, and reload the \
         server if they are new",
    )
}

/// Remedy for a failed request if repeating it cannot help.
pub(crate) fn remedy(failure: &str) -> Option<&'static str> {
    if failure.contains("payload") && failure.contains("exceed") {
        return Some("raise max_payload in the server's configuration");
    }
    let (_, code) = failure.split_once("error code ")?;
    let digits = code.split(|c: char| !c.is_ascii_digit()).next()?;
    let code: u64 = digits.parse().ok()?;
    let found = PERMANENT.iter().find(|(permanent, _)| *permanent == code);
    found.map(|(_, remedy)| *remedy)
}

/// As [`remedy`], for a process that is starting and has nothing to lose: a full storage, and a server that is connected
/// but whose JetStream has not answered `since` the request began.
pub(crate) fn remedy_at_start(failure: &str, since: Duration) -> Option<&'static str> {
    if is_storage_full(failure) {
        return Some(MORE_STORAGE);
    }
    (is_absent(failure) && since > ABSENCE_AT_START).then_some(ENABLE_JETSTREAM)
}

/// The reason of a request that the server refused for want of a permission.
pub(crate) fn permission(refusal: &str) -> String {
    format!(
        "{refusal}: grant the user of this process the permissions of its role, as agon nats-config prints them, or name \
         another with transport.nkey_path or transport.credentials_path"
    )
}

/// Whether a message was not stored for want of storage, which others may free.
pub(crate) fn is_storage_full(failure: &str) -> bool {
    let phrases = ["resource", "no space", "maximum bytes"];
    phrases.iter().any(|phrase| failure.contains(phrase))
}

/// Whether no JetStream has answered a request.
pub(crate) fn is_absent(failure: &str) -> bool {
    let phrases = ["no responders", "jetstream unavailable", "error code 10008"];
    phrases.iter().any(|phrase| failure.contains(phrase))
}

#[cfg(test)]
mod tests {
    use settings::{TransportSettings, resolve};

    use super::*;

    fn settings() -> JetStreamSettings {
        let text = "[transport]\nkind = \"jetstream\"\nurl = \"nats://nats:4222\"\n";
        let resolved = resolve(text, "test", &[]).expect("valid settings");
        match resolved.settings.transport {
            TransportSettings::Jetstream(settings) => *settings,
            TransportSettings::Memory {} => unreachable!("it says jetstream"),
        }
    }

    fn server() -> ServerInfo {
        ServerInfo {
            version: "2.9.10".into(),
            jetstream: true,
            max_payload: 1 << 20,
            ..ServerInfo::default()
        }
    }

    #[test]
    fn what_a_server_lacks_is_named_when_it_is_connected() {
        let cases = [
            (server(), None),
            (
                ServerInfo {
                    version: "2.10.1-beta.2".into(),
                    ..server()
                },
                None,
            ),
            (
                ServerInfo {
                    version: "mine".into(),
                    ..server()
                },
                None,
            ),
            (
                ServerInfo {
                    version: "2.8.4".into(),
                    ..server()
                },
                Some("2.8.4 is too old"),
            ),
            (
                ServerInfo {
                    jetstream: false,
                    ..server()
                },
                Some("without JetStream"),
            ),
            (
                ServerInfo {
                    max_payload: 64 << 10,
                    ..server()
                },
                Some("at most 65536 bytes"),
            ),
        ];
        for (info, expected) in cases {
            let error = check(&info, &settings()).err().map(|e| e.to_string());
            match expected {
                None => assert_eq!(error, None, "{info:?}"),
                Some(expected) => assert!(
                    error.as_ref().is_some_and(|error| error.contains(expected)),
                    "{error:?}"
                ),
            }
        }
        assert!(check_payload(&server(), &settings(), (1 << 20) + 1).is_err());
    }

    #[test]
    fn permanent_errors_have_remedies_and_others_are_retried() {
        let replicas = "jetstream error: replicas > 1 not supported in non-clustered mode (code 500, error code 10074)";
        assert!(remedy(replicas).is_some_and(|text| text.contains("transport.replicas")));
        let payload = "max payload size exceeded";
        assert!(remedy(payload).is_some_and(|text| text.contains("max_payload")));
        for transient in [
            "timed out",
            "jetstream error: stream not found (code 404, error code 10059)",
            "jetstream error: JetStream system temporarily unavailable (code 503, error code 10008)",
            "error code",
        ] {
            assert_eq!(remedy(transient), None, "{transient}");
        }
        let headers = "No Responders Requires Headers Support";
        assert!(remedy_of_connection(headers).is_some());
        let unknown =
            remedy_of_connection("authorization violation: nats: authorization violation");
        assert!(unknown.is_some_and(|remedy| remedy.contains("transport.nkey_path")));
        assert_eq!(remedy_of_connection("connection refused"), None);
        let (none, long) = (Duration::ZERO, Duration::from_secs(60));
        let full = "insufficient storage resources available (code 500, error code 10047)";
        assert_eq!(remedy(full), None, "a running process waits for room");
        assert!(remedy_at_start(full, none).is_some());
        assert_eq!(remedy_at_start("no responders", none), None);
        assert_eq!(
            remedy_at_start("no responders", long),
            Some(ENABLE_JETSTREAM)
        );
        assert_eq!(remedy_at_start("timed out", long), None);
    }
}
