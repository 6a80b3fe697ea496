//! Authentication in every supported way: password, token, nkey, credentials file and client certificate.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa};
use serde_json::{Value, json};
use tokio::time::timeout;
use transport::Transport;

use crate::server::TestServer;

/// Time within which a rejected client must get an error, well below the timeout of a role.
const DEADLINE: Duration = Duration::from_secs(15);

/// A temporary folder with credentials files.
struct Secrets(tempfile::TempDir);

impl Secrets {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).expect("it can be written");
        path
    }
}

/// A line of settings that names a file.
fn path_setting(key: &str, path: &Path) -> String {
    format!("{key} = {:?}\n", path.display().to_string())
}

/// Connects with these additional settings; the error as text.
async fn connect(server: &TestServer, more: &str) -> Result<(), String> {
    let settings = server.settings(more);
    let transport = timeout(DEADLINE, Transport::connect(&settings, "run")).await;
    let transport = transport.expect("an answer in time");
    transport.map(drop).map_err(|error| error.to_string())
}

async fn assert_connects(server: &TestServer, more: &str) {
    let connected = connect(server, more).await;
    assert_eq!(connected, Ok(()), "{more}");
}

async fn assert_rejected(server: &TestServer, more: &str) {
    let error = connect(server, more).await.expect_err("rejected");
    let message = error.to_lowercase();
    assert!(
        message.contains("authorization")
            || message.contains("certificate")
            || message.contains("tls"),
        "{more}: {error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_password_or_a_token() {
    let secrets = Secrets::new();
    let Some(server) = TestServer::with_config("authorization { user: ann, password: sesame }")
    else {
        return;
    };
    let (right, wrong) = (
        secrets.write("right", "ann:sesame\n"),
        secrets.write("wrong", "ann:open"),
    );
    assert_connects(&server, &path_setting("password_path", &right)).await;
    assert_rejected(&server, &path_setting("password_path", &wrong)).await;
    assert_rejected(&server, "").await;
    let colonless = path_setting("password_path", &secrets.write("colonless", "ann"));
    let error = connect(&server, &colonless).await.expect_err("no password");
    assert!(
        error.contains("colonless") && error.contains("user:password"),
        "{error}"
    );
    let absent = path_setting("password_path", &secrets.0.path().join("absent"));
    let error = connect(&server, &absent).await.expect_err("no file");
    assert!(error.contains("absent"), "{error}");

    let server = TestServer::with_config("authorization { token: sesame }").expect("there is one");
    assert_connects(
        &server,
        &path_setting("token_path", &secrets.write("token", "sesame\n")),
    )
    .await;
    assert_rejected(&server, &path_setting("token_path", &right)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_nkey() {
    let (secrets, user, stranger) = (Secrets::new(), KeyPair::new_user(), KeyPair::new_user());
    let config = format!(
        "authorization {{ users: [ {{ nkey: {} }} ] }}",
        user.public_key()
    );
    let Some(server) = TestServer::with_config(&config) else {
        return;
    };
    let seed = |name: &str, pair: &KeyPair| {
        let seed = pair.seed().expect("a new pair has its seed");
        path_setting("nkey_path", &secrets.write(name, &seed))
    };
    assert_connects(&server, &seed("user", &user)).await;
    assert_rejected(&server, &seed("stranger", &stranger)).await;
}

/// A NATS JWT: claims of `subject`, signed by `issuer`.
fn jwt(issuer: &KeyPair, subject: &KeyPair, name: &str, nats: &Value) -> String {
    let claims = json!({
        "jti": name, "iat": 0, "iss": issuer.public_key(), "name": name,
        "sub": subject.public_key(), "nats": nats,
    });
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let head = encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"}));
    let signed = format!("{head}.{}", encode(&claims));
    let signature = issuer.sign(signed.as_bytes()).expect("it has its seed");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_credentials_file() {
    let (secrets, operator) = (Secrets::new(), KeyPair::new_operator());
    let (account, system) = (KeyPair::new_account(), KeyPair::new_account());
    let (user, stranger) = (KeyPair::new_user(), KeyPair::new_account());
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let without = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1,
    });
    let of_account = |limits: &Value| json!({"type": "account", "version": 2, "limits": limits});
    let of_user = json!({
        "type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1,
    });
    let of_operator =
        json!({"type": "operator", "version": 2, "system_account": system.public_key()});
    let config = format!(
        "operator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {}, {}: {} }}",
        jwt(&operator, &operator, "operator", &of_operator),
        system.public_key(),
        account.public_key(),
        jwt(&operator, &account, "account", &of_account(&limits)),
        system.public_key(),
        jwt(&operator, &system, "system", &of_account(&without)),
    );
    let Some(server) = TestServer::with_config(&config) else {
        return;
    };
    let file = |name: &str, issuer: &KeyPair| {
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            jwt(issuer, &user, name, &of_user),
            user.seed().expect("a new pair has its seed"),
        );
        path_setting("credentials_path", &secrets.write(name, &text))
    };
    assert_connects(&server, &file("user.creds", &account)).await;
    assert_rejected(&server, &file("stranger.creds", &stranger)).await;
    assert_rejected(&server, "").await;
    let truncated = path_setting(
        "credentials_path",
        &secrets.write("torn.creds", "-----BEGIN"),
    );
    let error = connect(&server, &truncated)
        .await
        .expect_err("no credentials");
    assert!(error.contains("torn.creds"), "{error}");
}

/// A certificate of `authority` for the subject `subject`, and its key, in two files.
fn certificate(
    secrets: &Secrets,
    authority: &CertifiedIssuer<'_, rcgen::KeyPair>,
    name: &str,
    subject: &str,
) -> (PathBuf, PathBuf) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = CertificateParams::new([subject.to_owned()]).expect("a name");
    let signed = params.signed_by(&key, authority).expect("it is signed");
    (
        secrets.write(&format!("{name}.pem"), &signed.pem()),
        secrets.write(&format!("{name}.key"), &key.serialize_pem()),
    )
}

fn authority() -> CertifiedIssuer<'static, rcgen::KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().expect("a key");
    CertifiedIssuer::self_signed(params, key).expect("it signs itself")
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_with_certificates_of_both_sides() {
    let (secrets, ours, other) = (Secrets::new(), authority(), authority());
    let of_authority = secrets.write("authority.pem", &ours.pem());
    let of_other = secrets.write("other.pem", &other.pem());
    let (of_server, server_key) = certificate(&secrets, &ours, "server", "127.0.0.1");
    let config = format!(
        "tls {{ cert_file: {of_server:?}, key_file: {server_key:?}, ca_file: {of_authority:?}, verify: true }}"
    );
    let Some(server) = TestServer::with_config(&config) else {
        return;
    };
    let with = |authority: &Path, own: Option<&(PathBuf, PathBuf)>| {
        let own = own.map(|(certificate, key)| {
            path_setting("certificate_path", certificate) + &path_setting("key_path", key)
        });
        "tls = true\n".to_owned() + &path_setting("ca_path", authority) + &own.unwrap_or_default()
    };
    let client = certificate(&secrets, &ours, "client", "client");
    let stranger = certificate(&secrets, &other, "stranger", "stranger");
    assert_connects(&server, &with(&of_authority, Some(&client))).await;
    assert_rejected(&server, &with(&of_authority, Some(&stranger))).await;
    assert_rejected(&server, &with(&of_authority, None)).await;
    assert_rejected(&server, &with(&of_other, Some(&client))).await;
}
