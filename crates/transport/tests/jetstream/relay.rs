//! A relay before a server, which makes it a server that hangs: connected, and without any answer but to pings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// A relay on a free port.
pub struct Relay {
    pub port: u16,
    hangs: Arc<AtomicBool>,
}

impl Relay {
    /// A relay before the server at `to`.
    pub async fn before(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let hangs = Arc::new(AtomicBool::new(false));
        let is_hanging = Arc::clone(&hangs);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", to)).await;
                relay(client, server.expect("the server runs"), &is_hanging);
            }
        });
        Self { port, hangs }
    }

    /// From now on nothing passes.
    pub fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }
}

fn relay(client: TcpStream, server: TcpStream, is_hanging: &Arc<AtomicBool>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (answers, mut answered) = unbounded_channel::<Vec<u8>>();
    let (downwards, hangs): (UnboundedSender<_>, _) = (answers.clone(), Arc::clone(is_hanging));
    tokio::spawn(async move {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(read @ 1..) = from_server.read(&mut chunk).await {
            if !hangs.load(Ordering::Relaxed) {
                downwards.send(chunk[..read].to_vec()).ok();
            }
        }
    });
    let hangs = Arc::clone(is_hanging);
    tokio::spawn(async move {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(read @ 1..) = from_client.read(&mut chunk).await {
            if !hangs.load(Ordering::Relaxed) {
                to_server.write_all(&chunk[..read]).await.ok();
            } else if chunk[..read].windows(6).any(|bytes| bytes == b"PING\r\n") {
                answers.send(b"PONG\r\n".to_vec()).ok();
            }
        }
    });
    tokio::spawn(async move {
        while let Some(bytes) = answered.recv().await {
            to_client.write_all(&bytes).await.ok();
        }
    });
}
