//! A client of a NATS server that speaks the protocol itself: it sends what the program would not.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

/// A connection to a server on loopback, without credentials.
#[derive(Debug)]
pub struct RawNats(BufReader<TcpStream>);

impl RawNats {
    /// Connects; the server's error if it refuses.
    ///
    /// # Errors
    /// When the server refuses the client.
    ///
    /// # Panics
    /// If the server does not listen.
    pub fn connect(port: u16) -> Result<Self, String> {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the server listens");
        let mut client = Self(BufReader::new(stream));
        let info = client.line();
        assert!(info.starts_with("INFO "), "{info}");
        client.send(b"CONNECT {\"verbose\":false,\"headers\":true}\r\nPING\r\n");
        match client.line() {
            pong if pong == "PONG" => Ok(client),
            error => Err(error),
        }
    }

    /// Publishes, and returns when the server has read it.
    ///
    /// # Panics
    /// If the server refuses it.
    pub fn publish(&mut self, subject: &str, payload: &[u8]) {
        let head = format!("PUB {subject} {}\r\n", payload.len());
        self.send(&[head.as_bytes(), payload, b"\r\nPING\r\n"].concat());
        assert_eq!(self.line(), "PONG", "{subject}");
    }

    /// Payload of the last message of `subject` in a stream.
    ///
    /// # Panics
    /// If there is none.
    pub fn last(&mut self, stream: &str, subject: &str) -> Vec<u8> {
        let inbox = "_INBOX.raw";
        self.send(format!("SUB {inbox} 1\r\nUNSUB 1 1\r\n").as_bytes());
        self.send(
            format!("PUB $JS.API.DIRECT.GET.{stream}.{subject} {inbox} 0\r\n\r\n").as_bytes(),
        );
        let head = self.line();
        let mut numbers = head
            .split(' ')
            .rev()
            .map(|number| number.parse().unwrap_or(0));
        let (total, headers): (usize, usize) = (
            numbers.next().expect("a length"),
            numbers.next().expect("a length"),
        );
        let mut message = vec![0; total + 2];
        self.0.read_exact(&mut message).expect("a message");
        assert!(head.starts_with("HMSG ") && total > headers, "{head}");
        message[headers..total].to_vec()
    }

    /// The next line, after answers to the server's own pings.
    fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("an answer");
            match line.trim_end() {
                "PING" => self.send(b"PONG\r\n"),
                text => return text.to_owned(),
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("it is sent");
    }
}
