//! A hub of one model, as the Hugging Face hub answers: on sockets of its own, with nothing that the program uses.
//!
//! It tells what a revision holds, gives small files itself and sends whoever asks for weights elsewhere, all of them
//! in ranges. What it was asked is kept.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use serde_json::json;

use crate::{Ended, Workplace, agon_binary};

/// The one model's repository.
pub const REPOSITORY: &str = "org/tiny";
/// The commit that its branch `main` and its tag `v1` are.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the environment may say of proxies, which are not for a hub on this machine.
const PROXIES: [&str; 6] = [
    "ALL_PROXY",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "all_proxy",
    "https_proxy",
    "http_proxy",
];

/// A hub that answers until the process ends.
pub struct FakeHub {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    files: BTreeMap<String, Vec<u8>>,
    /// Who does not show it gets no file.
    token: Option<&'static str>,
    asked: Mutex<Vec<String>>,
}

impl FakeHub {
    /// A hub whose one model is the files of `folder`; for everyone, or for who shows `token`.
    ///
    /// # Panics
    /// When there is no free port, or a file cannot be read.
    pub fn start(folder: &Path, token: Option<&'static str>) -> Self {
        let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let files = entries.map(|entry| {
            let entry = entry.expect("an entry of a folder");
            let name = entry.file_name().into_string().expect("a plain name");
            (name, fs::read(entry.path()).expect("a file of a model"))
        });
        let shared = Arc::new(Shared {
            files: files.collect(),
            token,
            asked: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let answering = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&answering);
                // Whoever asked may be gone before the answer.
                thread::spawn(move || drop(shared.answer(stream, address)));
            }
        });
        Self { address, shared }
    }

    /// The paths that it was asked for so far.
    pub fn asked(&self) -> Vec<String> {
        let asked = self.shared.asked.lock();
        asked.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// `agon` with these arguments, models of the hub coming from `url` into the folder `hf` of the workplace.
pub fn agon_at_hub<S: AsRef<OsStr>>(workplace: &Workplace, url: &str, arguments: &[S]) -> Command {
    let mut command = Command::new(agon_binary());
    let own = [
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    ];
    for name in PROXIES.into_iter().chain(own) {
        command.env_remove(name);
    }
    command.args(arguments).env("HF_ENDPOINT", url);
    command.env("HF_HOME", workplace.path("hf"));
    command
}

/// Runs [`agon_at_hub`] with further variables.
pub fn run_at_hub<S: AsRef<OsStr>>(
    workplace: &Workplace,
    url: &str,
    arguments: &[S],
    variables: &[(&str, &str)],
) -> Ended {
    let mut command = agon_at_hub(workplace, url, arguments);
    command.envs(variables.iter().copied());
    workplace.start_command(command).wait()
}

/// A request, as far as it matters here.
struct Request {
    path: String,
    token: Option<String>,
    range: Option<String>,
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let (mut token, mut range) = (None, None);
    for line in lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
    {
        let (name, value) = line.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "authorization" => token = value.trim().strip_prefix("Bearer ").map(str::to_owned),
            "range" => range = value.trim().strip_prefix("bytes=").map(str::to_owned),
            _ => {}
        }
    }
    Some(Request { path, token, range })
}

impl Shared {
    fn answer(&self, mut stream: TcpStream, address: SocketAddr) -> std::io::Result<()> {
        let Some(request) = read(&stream) else {
            return Ok(());
        };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.push(request.path.clone());
        drop(asked);
        let (status, headers, body) = self.reply(&request, address);
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status} .\r\ncontent-length: {length}\r\nconnection: close\r\n"
        )?;
        for (name, value) in headers {
            write!(stream, "{name}: {value}\r\n")?;
        }
        stream.write_all(b"\r\n")?;
        stream.write_all(&body)
    }

    fn reply(&self, request: &Request, address: SocketAddr) -> Reply {
        if let Some(file) = request.path.strip_prefix("/elsewhere/") {
            return self.file(file, request);
        }
        let api = format!("/api/models/{REPOSITORY}/revision/");
        let resolve = format!("/{REPOSITORY}/resolve/");
        if let Some(revision) = request.path.strip_prefix(&api) {
            return match is_revision(revision) {
                true => self.info(),
                false => refused(404, "RevisionNotFound"),
            };
        }
        let Some((revision, file)) = request
            .path
            .strip_prefix(&resolve)
            .and_then(|rest| rest.split_once('/'))
        else {
            // The hub does not tell strangers what is private and what is not there.
            return refused(401, "RepoNotFound");
        };
        if !is_revision(revision) {
            return refused(404, "RevisionNotFound");
        }
        match (self.token, request.token.as_deref()) {
            (Some(_), None) => return refused(401, "GatedRepo"),
            (Some(wanted), Some(shown)) if wanted != shown => return refused(403, "GatedRepo"),
            _ => {}
        }
        if file.ends_with(".safetensors") && self.files.contains_key(file) {
            let elsewhere = format!("http://{address}/elsewhere/{file}");
            let headers = vec![
                ("location", elsewhere),
                ("x-repo-commit", COMMIT.to_owned()),
                ("x-linked-etag", etag(file)),
            ];
            return (302, headers, Vec::new());
        }
        self.file(file, request)
    }

    fn info(&self) -> Reply {
        let names = self.files.keys().map(|name| json!({"rfilename": name}));
        let info = json!({"sha": COMMIT, "siblings": names.collect::<Vec<_>>()});
        (200, Vec::new(), info.to_string().into_bytes())
    }

    fn file(&self, name: &str, request: &Request) -> Reply {
        let Some(bytes) = self.files.get(name) else {
            return refused(404, "EntryNotFound");
        };
        let last = bytes.len() - 1;
        let range = request.range.as_deref().unwrap_or("0-");
        let (first, end) = range.split_once('-').expect("a range");
        let first: usize = first.parse().expect("a place");
        let end = end.parse().unwrap_or(last).min(last);
        let headers = vec![
            ("etag", etag(name)),
            ("x-repo-commit", COMMIT.to_owned()),
            (
                "content-range",
                format!("bytes {first}-{end}/{}", bytes.len()),
            ),
        ];
        (206, headers, bytes[first..=end].to_vec())
    }
}

type Reply = (u16, Vec<(&'static str, String)>, Vec<u8>);

fn is_revision(revision: &str) -> bool {
    ["main", "v1", COMMIT].contains(&revision)
}

fn etag(name: &str) -> String {
    format!("\"{name}-1\"")
}

fn refused(status: u16, code: &str) -> Reply {
    (
        status,
        vec![("x-error-code", code.to_owned())],
        b"{}".to_vec(),
    )
}
