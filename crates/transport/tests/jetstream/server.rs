//! A nats-server for one test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use settings::{JetStreamSettings, TransportSettings, resolve};
use transport::Transport;

/// In place of a JetStream configuration: the server has none.
const NO_JETSTREAM: &str = "none";

/// A server on a free port with a temporary storage directory.
pub struct TestServer {
    store: tempfile::TempDir,
    pub port: u16,
    jetstream_config: &'static str,
    config: String,
    process: Child,
}

impl TestServer {
    /// `None`, with a message, where nats-server is not installed; a panic in continuous integration.
    pub fn start() -> Option<Self> {
        Self::with_jetstream_config("")
    }

    /// A server with additional lines in its JetStream configuration.
    pub fn with_jetstream_config(config: &'static str) -> Option<Self> {
        Self::configured(config, "")
    }

    /// A server with additional lines in its configuration.
    pub fn with_config(config: &str) -> Option<Self> {
        Self::configured("", config)
    }

    /// A server without JetStream.
    pub fn without_jetstream() -> Option<Self> {
        Self::configured(NO_JETSTREAM, "")
    }

    /// A server with additional lines in its JetStream configuration and in its configuration.
    pub fn configured(jetstream_config: &'static str, config: &str) -> Option<Self> {
        let version = Command::new("nats-server").arg("--version").output();
        if version.is_err() {
            assert!(
                std::env::var_os("CI").is_none(),
                "nats-server is missing: apt install nats-server"
            );
            eprintln!("SKIPPED: nats-server is missing: apt install nats-server");
            return None;
        }
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("it has an address").port();
        drop(free);
        let store = tempfile::tempdir().expect("a folder");
        let process = spawn(store.path(), port, jetstream_config, config);
        Some(Self {
            store,
            port,
            jetstream_config,
            config: config.to_owned(),
            process,
        })
    }

    pub fn settings(&self, more: &str) -> JetStreamSettings {
        self.settings_with(&format!("timeout_seconds = 20\n{more}"))
    }

    /// Settings with these lines alone in addition to the server and a short lease.
    pub fn settings_with(&self, lines: &str) -> JetStreamSettings {
        Self::settings_at(self.port, lines)
    }

    /// Settings with these lines alone in addition to a server at this port and a short lease.
    pub fn settings_at(port: u16, lines: &str) -> JetStreamSettings {
        let text = format!(
            "[transport]\nkind = \"jetstream\"\nurl = \"nats://127.0.0.1:{port}\"\nlease_seconds = 1\n{lines}",
        );
        let resolved = resolve(&text, "test", &[]).expect("valid settings");
        match resolved.settings.transport {
            TransportSettings::Jetstream(settings) => *settings,
            TransportSettings::Memory {} => unreachable!("it says jetstream"),
        }
    }

    pub async fn connect(&self, run: &str) -> Transport {
        self.connect_with(run, "").await
    }

    pub async fn connect_with(&self, run: &str, more: &str) -> Transport {
        let settings = self.settings(more);
        let transport = Transport::connect(&settings, run).await;
        transport.expect("the server runs")
    }

    /// A plain NATS client.
    pub async fn client(&self) -> async_nats::jetstream::Context {
        let client = async_nats::connect(format!("127.0.0.1:{}", self.port));
        async_nats::jetstream::new(client.await.expect("the server runs"))
    }

    pub fn kill(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it ends");
    }

    /// Stops the server with SIGTERM, so that it flushes its storage.
    pub fn stop(&mut self) {
        let kill = format!("kill -TERM {}", self.process.id());
        let status = Command::new("sh").args(["-c", &kill]).status();
        assert!(status.expect("a shell").success(), "it runs");
        self.process.wait().expect("it ends");
    }

    /// Directory of a stream's stored messages.
    pub fn messages_of(&self, stream: &str) -> PathBuf {
        let streams = self.store.path().join("jetstream/jetstream/$G/streams");
        streams.join(stream).join("msgs")
    }

    pub fn restart(&mut self) {
        self.process = spawn(
            self.store.path(),
            self.port,
            self.jetstream_config,
            &self.config,
        );
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn spawn(store: &Path, port: u16, jetstream_config: &str, config: &str) -> Child {
    let path = store.join("server.conf");
    let folder = store.join("jetstream").display().to_string();
    let jetstream = match jetstream_config {
        NO_JETSTREAM => String::new(),
        more => format!("jetstream {{\n store_dir: {folder:?}\n {more}\n}}\n"),
    };
    let text = format!("listen: \"127.0.0.1:{port}\"\n{config}\n{jetstream}");
    std::fs::write(&path, text).expect("it can be written");
    Command::new("nats-server")
        .arg("-c")
        .arg(path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}
