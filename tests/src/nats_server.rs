//! A NATS server for roles that are started one by one.

use std::{
    ffi::OsStr,
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
};

use crate::{Sandbox, signal, wait_until};

/// A server with JetStream on a free port of loopback, its store in a sandbox; killed on drop.
#[derive(Debug)]
pub struct NatsServer {
    process: Child,
    port: u16,
}

impl NatsServer {
    /// Starts a server.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(sandbox: &Sandbox) -> Self {
        Self::start_with(sandbox, Command::new("nats-server"))
    }

    /// Starts a server by a command to which the server's arguments are appended.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_with(sandbox: &Sandbox, mut command: Command) -> Self {
        let port = free_port();
        let store = sandbox.path("store");
        let process = command
            .args(server_arguments(port))
            .args([OsStr::new("-sd"), store.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nats-server starts");
        wait_until("the server", || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        Self { process, port }
    }

    /// Port of the server.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Suspends the server: its connections stay open, and nothing is answered.
    pub fn suspend(&self) {
        signal(self.process.id(), "STOP");
    }

    /// Continues after [`Self::suspend`].
    pub fn resume(&self) {
        signal(self.process.id(), "CONT");
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        // Errors mean that it has exited already.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A port of loopback that is free now.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    free.local_addr().expect("a bound listener").port()
}

fn server_arguments(port: u16) -> [String; 5] {
    ["-a", "127.0.0.1", "-p", &port.to_string(), "-js"].map(str::to_owned)
}
