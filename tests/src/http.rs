//! A minimal HTTP client on a plain socket, independent of the program's HTTP stack.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

/// Read timeout, far above any response time.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Sends a request to `http://host:port` and returns the status code and the JSON body.
///
/// # Panics
/// If there is no response, or its body is not JSON.
#[track_caller]
pub fn http(base: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
    let address = base.strip_prefix("http://").expect("an http:// address");
    let mut stream = TcpStream::connect(address).unwrap_or_else(|e| panic!("{base}: {e}"));
    stream
        .set_read_timeout(Some(READ_TIMEOUT))
        .expect("a valid timeout");
    // HTTP/1.0: the response is not chunked and ends with the connection.
    let request = format!(
        "{method} {path} HTTP/1.0\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream
        .write_all(request.as_bytes())
        .expect("the server accepts the request");
    let mut response = String::new();
    stream
        .read_to_string(&mut response)
        .expect("the server responds in time");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}"));
    (
        status.unwrap_or_else(|| panic!("no status in {head}")),
        body,
    )
}
