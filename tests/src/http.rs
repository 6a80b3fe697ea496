//! A request over HTTP, as bytes on a socket: nothing that the program uses itself.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

/// No answer in these tests takes near so long.
const DEADLINE: Duration = Duration::from_secs(60);

/// Sends one request to `http://host:port` and reads the whole answer: its status and its JSON.
///
/// # Panics
/// When there is no answer, or it is no JSON.
#[track_caller]
pub fn http(base: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
    let address = base.strip_prefix("http://").expect("an address");
    let mut stream = TcpStream::connect(address).unwrap_or_else(|e| panic!("{base}: {e}"));
    stream
        .set_read_timeout(Some(DEADLINE))
        .expect("a time to wait");
    // As version 1.0: the answer comes in one piece and then ends.
    let request = format!(
        "{method} {path} HTTP/1.0\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream
        .write_all(request.as_bytes())
        .expect("it takes the request");
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .expect("it answers in time");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}"));
    (
        status.unwrap_or_else(|| panic!("no status in {head}")),
        body,
    )
}
