//! Who may enter a server, in every way that the settings know: with a password, a token, an nkey, a file of
//! credentials, and a certificate.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa};
use serde_json::{Value, json};
use tokio::time::timeout;
use transport::Hub;

use crate::server::Server;

/// Who is refused is told so long before a role would give up.
const SOON: Duration = Duration::from_secs(15);

/// A folder with files of secrets.
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
fn names(key: &str, path: &Path) -> String {
    format!("{key} = {:?}\n", path.display().to_string())
}

/// Whether one who comes with these settings may enter, or why not.
async fn enters(server: &Server, more: &str) -> Result<(), String> {
    let settings = server.settings(more);
    let hub = timeout(SOON, Hub::connect(&settings, "run")).await;
    let hub = hub.expect("an answer in time");
    hub.map(drop).map_err(|error| error.to_string())
}

async fn may_enter(server: &Server, more: &str) {
    let entered = enters(server, more).await;
    assert_eq!(entered, Ok(()), "{more}");
}

async fn is_refused(server: &Server, more: &str) {
    let refused = enters(server, more).await.expect_err("it is refused");
    let said = refused.to_lowercase();
    assert!(
        said.contains("authorization") || said.contains("certificate") || said.contains("tls"),
        "{more}: {refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_password_or_a_token() {
    let secrets = Secrets::new();
    let Some(server) = Server::that_says("authorization { user: ann, password: sesame }") else {
        return;
    };
    let (right, wrong) = (
        secrets.write("right", "ann:sesame\n"),
        secrets.write("wrong", "ann:open"),
    );
    may_enter(&server, &names("password_path", &right)).await;
    is_refused(&server, &names("password_path", &wrong)).await;
    is_refused(&server, "").await;
    let colonless = names("password_path", &secrets.write("colonless", "ann"));
    let said = enters(&server, &colonless).await.expect_err("no password");
    assert!(
        said.contains("colonless") && said.contains("user:password"),
        "{said}"
    );
    let absent = names("password_path", &secrets.0.path().join("absent"));
    let said = enters(&server, &absent).await.expect_err("no file");
    assert!(said.contains("absent"), "{said}");

    let server = Server::that_says("authorization { token: sesame }").expect("there is one");
    may_enter(
        &server,
        &names("token_path", &secrets.write("token", "sesame\n")),
    )
    .await;
    is_refused(&server, &names("token_path", &right)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_nkey() {
    let (secrets, user, stranger) = (Secrets::new(), KeyPair::new_user(), KeyPair::new_user());
    let says = format!(
        "authorization {{ users: [ {{ nkey: {} }} ] }}",
        user.public_key()
    );
    let Some(server) = Server::that_says(&says) else {
        return;
    };
    let seed = |name: &str, pair: &KeyPair| {
        let seed = pair.seed().expect("a new pair has its seed");
        names("nkey_path", &secrets.write(name, &seed))
    };
    may_enter(&server, &seed("user", &user)).await;
    is_refused(&server, &seed("stranger", &stranger)).await;
}

/// A token as NATS has them: claims of `subject`, signed by `issuer`.
fn token(issuer: &KeyPair, subject: &KeyPair, name: &str, nats: &Value) -> String {
    let claims = json!({
        "jti": name, "iat": 0, "iss": issuer.public_key(), "name": name,
        "sub": subject.public_key(), "nats": nats,
    });
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let head = part(&json!({"typ": "JWT", "alg": "ed25519-nkey"}));
    let signed = format!("{head}.{}", part(&claims));
    let signature = issuer.sign(signed.as_bytes()).expect("it has its seed");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_file_of_credentials() {
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
    let says = format!(
        "operator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {}, {}: {} }}",
        token(&operator, &operator, "operator", &of_operator),
        system.public_key(),
        account.public_key(),
        token(&operator, &account, "account", &of_account(&limits)),
        system.public_key(),
        token(&operator, &system, "system", &of_account(&without)),
    );
    let Some(server) = Server::that_says(&says) else {
        return;
    };
    let file = |name: &str, issuer: &KeyPair| {
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            token(issuer, &user, name, &of_user),
            user.seed().expect("a new pair has its seed"),
        );
        names("credentials_path", &secrets.write(name, &text))
    };
    may_enter(&server, &file("user.creds", &account)).await;
    is_refused(&server, &file("stranger.creds", &stranger)).await;
    is_refused(&server, "").await;
    let torn = names(
        "credentials_path",
        &secrets.write("torn.creds", "-----BEGIN"),
    );
    let said = enters(&server, &torn).await.expect_err("no credentials");
    assert!(said.contains("torn.creds"), "{said}");
}

/// A certificate of this authority for a name or an address, and its key, in two files.
fn certificate(
    secrets: &Secrets,
    authority: &CertifiedIssuer<'_, rcgen::KeyPair>,
    name: &str,
    whom: &str,
) -> (PathBuf, PathBuf) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = CertificateParams::new([whom.to_owned()]).expect("a name");
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
    let says = format!(
        "tls {{ cert_file: {of_server:?}, key_file: {server_key:?}, ca_file: {of_authority:?}, verify: true }}"
    );
    let Some(server) = Server::that_says(&says) else {
        return;
    };
    let with = |authority: &Path, own: Option<&(PathBuf, PathBuf)>| {
        let own = own.map(|(certificate, key)| {
            names("certificate_path", certificate) + &names("key_path", key)
        });
        "tls = true\n".to_owned() + &names("ca_path", authority) + &own.unwrap_or_default()
    };
    let client = certificate(&secrets, &ours, "client", "client");
    let stranger = certificate(&secrets, &other, "stranger", "stranger");
    may_enter(&server, &with(&of_authority, Some(&client))).await;
    is_refused(&server, &with(&of_authority, Some(&stranger))).await;
    is_refused(&server, &with(&of_authority, None)).await;
    is_refused(&server, &with(&of_other, Some(&client))).await;
}
