//! A nats-server of one test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use settings::{JetStreamSettings, TransportSettings, resolve};
use transport::Hub;

/// A server of one test, on a port and with a store of its own.
pub struct Server {
    store: tempfile::TempDir,
    pub port: u16,
    limits: &'static str,
    more: String,
    process: Child,
}

impl Server {
    /// `None` where there is no nats-server, which is told, and in continuous integration an error.
    pub fn start() -> Option<Self> {
        Self::within("")
    }

    /// A server with these further lines in its configuration of JetStream.
    pub fn within(limits: &'static str) -> Option<Self> {
        Self::configured(limits, "")
    }

    /// A server with these further lines in its configuration.
    pub fn that_says(more: &str) -> Option<Self> {
        Self::configured("", more)
    }

    fn configured(limits: &'static str, more: &str) -> Option<Self> {
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
        let process = spawn(store.path(), port, limits, more);
        Some(Self {
            store,
            port,
            limits,
            more: more.to_owned(),
            process,
        })
    }

    pub fn settings(&self, more: &str) -> JetStreamSettings {
        let text = format!(
            "[transport]\nkind = \"jetstream\"\nurl = \"nats://127.0.0.1:{}\"\nlease_seconds = 1\n\
             timeout_seconds = 20\n{more}",
            self.port
        );
        let resolved = resolve(&text, "test", &[]).expect("they are sound");
        match resolved.settings.transport {
            TransportSettings::Jetstream(settings) => *settings,
            TransportSettings::Memory {} => unreachable!("it says jetstream"),
        }
    }

    pub async fn hub(&self, run: &str) -> Hub {
        self.hub_with(run, "").await
    }

    pub async fn hub_with(&self, run: &str, more: &str) -> Hub {
        let settings = self.settings(more);
        let hub = Hub::connect(&settings, run).await;
        hub.expect("the server runs")
    }

    /// What others than this project would use.
    pub async fn client(&self) -> async_nats::jetstream::Context {
        let client = async_nats::connect(format!("127.0.0.1:{}", self.port));
        async_nats::jetstream::new(client.await.expect("the server runs"))
    }

    pub fn kill(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it ends");
    }

    /// Asks the server to end, so that nothing it has in memory is lost.
    pub fn stop(&mut self) {
        let kill = format!("kill -TERM {}", self.process.id());
        let asked = Command::new("sh").args(["-c", &kill]).status();
        assert!(asked.expect("a shell").success(), "it runs");
        self.process.wait().expect("it ends");
    }

    /// Where the server keeps the messages of a stream.
    pub fn messages_of(&self, stream: &str) -> PathBuf {
        let streams = self.store.path().join("jetstream/jetstream/$G/streams");
        streams.join(stream).join("msgs")
    }

    pub fn again(&mut self) {
        self.process = spawn(self.store.path(), self.port, self.limits, &self.more);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn spawn(store: &Path, port: u16, limits: &str, more: &str) -> Child {
    let config = store.join("server.conf");
    let text = format!(
        "listen: \"127.0.0.1:{port}\"\n{more}\njetstream {{\n store_dir: {:?}\n {limits}\n}}\n",
        store.join("jetstream").display().to_string()
    );
    std::fs::write(&config, text).expect("it can be written");
    Command::new("nats-server")
        .arg("-c")
        .arg(config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}
