//! A fake endpoint for judges on plain sockets, independent of the program's HTTP stack: an OpenAI-compatible chat
//! endpoint or a preference service, well-behaved or not.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

use serde_json::{Value, json};

/// A server that answers with a closure until the process exits.
pub struct FakeChat {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<FakeChatRequest>>>,
}

/// A request as received.
#[derive(Debug, Clone)]
pub struct FakeChatRequest {
    /// Path of the URL.
    pub path: String,
    /// Authorization header.
    pub authorization: Option<String>,
    /// Body.
    pub body: Value,
    /// Time of arrival.
    pub at: Instant,
}

/// A response.
#[derive(Debug, Clone)]
pub struct FakeChatResponse {
    /// Status code.
    pub status: u16,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: String,
}

impl FakeChatRequest {
    /// The user's message.
    pub fn text(&self) -> &str {
        let messages = self.body["messages"].as_array();
        let last = messages.and_then(|messages| messages.last());
        last.and_then(|message| message["content"].as_str())
            .unwrap_or_default()
    }
}

impl FakeChatResponse {
    /// A response with this status, and this body as JSON.
    pub fn json(status: u16, body: &Value) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.to_string(),
        }
    }

    /// A chat completion with this text by this model.
    pub fn completion(model: &str, text: &str) -> Self {
        let message = json!({"role": "assistant", "content": text});
        let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
        Self::json(200, &json!({"model": model, "choices": [choice]}))
    }

    /// The same response with another header.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl FakeChat {
    /// Starts a server; `answer` gets the number of earlier requests.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn start(
        answer: impl Fn(usize, &FakeChatRequest) -> FakeChatResponse + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound listener");
        let requests: Arc<Mutex<Vec<FakeChatRequest>>> = Arc::default();
        let (recorded, answer) = (Arc::clone(&requests), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (recorded, answer) = (Arc::clone(&recorded), Arc::clone(&answer));
                // The client may disconnect before the response.
                thread::spawn(move || {
                    let request = read_request(&stream)?;
                    let mut recorded = recorded.lock().unwrap_or_else(PoisonError::into_inner);
                    recorded.push(request.clone());
                    let before = recorded.len() - 1;
                    drop(recorded);
                    write_response(stream, &answer(before, &request)).ok()
                });
            }
        });
        Self { address, requests }
    }

    /// Requests so far.
    pub fn requests(&self) -> Vec<FakeChatRequest> {
        let requests = self.requests.lock();
        requests.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Base URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn read_request(stream: &TcpStream) -> Option<FakeChatRequest> {
    let at = Instant::now();
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    };
    let path = line()?.split(' ').nth(1)?.to_owned();
    let (mut authorization, mut length) = (None, 0);
    loop {
        let header = line()?;
        if header.is_empty() {
            break;
        }
        let (name, value) = header.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "authorization" => authorization = Some(value.trim().to_owned()),
            "content-length" => length = value.trim().parse().ok()?,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(FakeChatRequest {
        path,
        authorization,
        body: serde_json::from_slice(&body).unwrap_or_default(),
        at,
    })
}

fn write_response(mut stream: TcpStream, response: &FakeChatResponse) -> std::io::Result<()> {
    let FakeChatResponse {
        status,
        headers,
        body,
    } = response;
    let length = body.len();
    let mut head = format!(
        "HTTP/1.1 {status} .\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n"
    );
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n{body}").as_bytes())
}
