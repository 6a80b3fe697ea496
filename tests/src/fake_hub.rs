//! A fake Hugging Face hub with one model, on plain sockets, independent of the program's HTTP stack.
//!
//! It lists the files of a revision, serves small files itself and redirects requests for weights to a delivery server
//! at another address, with support for range requests. The requested paths are recorded, and the tokens that the
//! delivery server receives. A hostile hub states names and sizes that are not those of the files.

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

use crate::{ProcessOutput, Sandbox, agon_binary};

/// Repository of the model.
pub const REPOSITORY: &str = "org/tiny";
/// Commit of the branch `main` and of the tag `v1`.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Proxy variables, removed from the environment because the hub is on localhost.
const PROXIES: [&str; 6] = [
    "ALL_PROXY",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "all_proxy",
    "https_proxy",
    "http_proxy",
];

/// A fake hub that serves until the process exits.
pub struct FakeHub {
    address: SocketAddr,
    state: Arc<HubState>,
}

/// What a hostile hub states; the default is an honest one.
#[derive(Debug, Clone, Default)]
pub struct HubLies {
    /// Commit in the metadata of the repository.
    pub sha: Option<String>,
    /// Commit in the headers of files.
    pub commit: Option<String>,
    /// ETag of every file.
    pub etag: Option<String>,
    /// Files that the repository lists in addition.
    pub siblings: Vec<String>,
    /// Size of every file in bytes.
    pub size: Option<u64>,
    /// Where requests for weights are redirected.
    pub location: Option<String>,
    /// Whether all requests are redirected to the delivery server.
    pub redirects_everything: bool,
}

struct HubState {
    files: BTreeMap<String, Vec<u8>>,
    /// Token required for files.
    token: Option<&'static str>,
    lies: HubLies,
    requests: Mutex<Vec<String>>,
    delivery_address: SocketAddr,
    /// Tokens that the delivery server received.
    delivered_tokens: Mutex<Vec<String>>,
}

/// The two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Hub,
    Delivery,
}

impl FakeHub {
    /// Serves the files of `folder` as the model; with a `token`, as a gated model.
    ///
    /// # Panics
    /// If there is no free port, or a file cannot be read.
    pub fn start(folder: &Path, token: Option<&'static str>) -> Self {
        Self::hostile(folder, token, HubLies::default())
    }

    /// As [`Self::start`], with these statements in place of the truth.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn hostile(folder: &Path, token: Option<&'static str>, lies: HubLies) -> Self {
        let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let files = entries.map(|entry| {
            let entry = entry.expect("a directory entry");
            let name = entry.file_name().into_string().expect("a plain name");
            (name, fs::read(entry.path()).expect("a file of a model"))
        });
        let [hub, delivery] =
            [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let address = |listener: &TcpListener| listener.local_addr().expect("a bound listener");
        let state = Arc::new(HubState {
            files: files.collect(),
            token,
            lies,
            requests: Mutex::default(),
            delivery_address: address(&delivery),
            delivered_tokens: Mutex::default(),
        });
        let address = address(&hub);
        for (listener, server) in [(hub, Server::Hub), (delivery, Server::Delivery)] {
            let server_state = Arc::clone(&state);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&server_state);
                    // The client may disconnect before the response.
                    thread::spawn(move || drop(state.serve(stream, server)));
                }
            });
        }
        Self { address, state }
    }

    /// Tokens that were sent to the delivery server so far.
    pub fn delivered_tokens(&self) -> Vec<String> {
        let tokens = self.state.delivered_tokens.lock();
        tokens.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Paths requested so far.
    pub fn requests(&self) -> Vec<String> {
        let requests = self.state.requests.lock();
        requests.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Base URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// An `agon` command that downloads hub models from `url` into the folder `hf` of the sandbox.
pub fn agon_with_hub<S: AsRef<OsStr>>(sandbox: &Sandbox, url: &str, arguments: &[S]) -> Command {
    let mut command = Command::new(agon_binary());
    let hub_variables = [
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    ];
    for name in PROXIES.into_iter().chain(hub_variables) {
        command.env_remove(name);
    }
    command.args(arguments).env("HF_ENDPOINT", url);
    command.env("HF_HOME", sandbox.path("hf"));
    command
}

/// Runs [`agon_with_hub`] with additional environment variables.
pub fn run_with_hub<S: AsRef<OsStr>>(
    sandbox: &Sandbox,
    url: &str,
    arguments: &[S],
    variables: &[(&str, &str)],
) -> ProcessOutput {
    let mut command = agon_with_hub(sandbox, url, arguments);
    command.envs(variables.iter().copied());
    sandbox.start_command(command).wait()
}

/// The parts of an HTTP request that the hub uses.
struct HubRequest {
    path: String,
    token: Option<String>,
    range: Option<String>,
}

fn read_request(stream: &TcpStream) -> Option<HubRequest> {
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
    Some(HubRequest { path, token, range })
}

impl HubState {
    fn serve(&self, mut stream: TcpStream, server: Server) -> std::io::Result<()> {
        let Some(request) = read_request(&stream) else {
            return Ok(());
        };
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.push(request.path.clone());
        drop(requests);
        if server == Server::Delivery {
            let tokens = self.delivered_tokens.lock();
            let mut tokens = tokens.unwrap_or_else(PoisonError::into_inner);
            tokens.extend(request.token.clone());
        }
        let (status, headers, body) = self.respond(&request, server);
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

    fn respond(&self, request: &HubRequest, server: Server) -> HubResponse {
        if let Some(file) = request.path.strip_prefix("/redirected/") {
            return self.file(file, request);
        }
        if server == Server::Hub && self.lies.redirects_everything {
            let location = format!("http://{}{}", self.delivery_address, request.path);
            return (307, vec![("location", location)], Vec::new());
        }
        let api = format!("/api/models/{REPOSITORY}/revision/");
        let resolve = format!("/{REPOSITORY}/resolve/");
        if let Some(revision) = request.path.strip_prefix(&api) {
            return match is_revision(revision) {
                true => self.info(),
                false => error(404, "RevisionNotFound"),
            };
        }
        let Some((revision, file)) = request
            .path
            .strip_prefix(&resolve)
            .and_then(|rest| rest.split_once('/'))
        else {
            // Without a token, the hub does not distinguish private from missing repositories.
            return error(401, "RepoNotFound");
        };
        if !is_revision(revision) {
            return error(404, "RevisionNotFound");
        }
        match (self.token, request.token.as_deref()) {
            _ if server == Server::Delivery => {}
            (Some(_), None) => return error(401, "GatedRepo"),
            (Some(expected), Some(token)) if expected != token => return error(403, "GatedRepo"),
            _ => {}
        }
        if file.ends_with(".safetensors") && self.files.contains_key(file) {
            let location = format!("http://{}/redirected/{file}", self.delivery_address);
            let headers = vec![
                ("location", self.lies.location.clone().unwrap_or(location)),
                ("x-repo-commit", self.commit()),
                ("x-linked-etag", self.etag(file)),
            ];
            return (302, headers, Vec::new());
        }
        self.file(file, request)
    }

    fn info(&self) -> HubResponse {
        let names = self.files.keys().chain(&self.lies.siblings);
        let siblings: Vec<_> = names.map(|name| json!({"rfilename": name})).collect();
        let sha = self.lies.sha.as_deref().unwrap_or(COMMIT);
        let info = json!({"sha": sha, "siblings": siblings});
        (200, Vec::new(), info.to_string().into_bytes())
    }

    fn file(&self, name: &str, request: &HubRequest) -> HubResponse {
        let known = self.files.get(name);
        // A hostile hub has every file that it lists.
        let any = (!self.lies.siblings.is_empty()).then(Vec::new);
        let Some(bytes) = known.or(any.as_ref()) else {
            return error(404, "EntryNotFound");
        };
        let last = bytes.len().saturating_sub(1);
        let range = request.range.as_deref().unwrap_or("0-");
        let (first, end) = range.split_once('-').expect("a range");
        let first: usize = first.parse().expect("an offset");
        let end = end.parse().unwrap_or(last).min(last);
        let size = self.lies.size.unwrap_or(bytes.len() as u64);
        let headers = vec![
            ("etag", self.etag(name)),
            ("x-repo-commit", self.commit()),
            ("content-range", format!("bytes {first}-{end}/{size}")),
        ];
        let body = bytes.get(first..=end).unwrap_or_default().to_vec();
        (206, headers, body)
    }

    fn commit(&self) -> String {
        self.lies.commit.as_deref().unwrap_or(COMMIT).to_owned()
    }

    fn etag(&self, name: &str) -> String {
        let etag = self.lies.etag.clone();
        format!("{:?}", etag.unwrap_or_else(|| format!("{name}-1")))
    }
}

type HubResponse = (u16, Vec<(&'static str, String)>, Vec<u8>);

fn is_revision(revision: &str) -> bool {
    ["main", "v1", COMMIT].contains(&revision)
}

fn error(status: u16, code: &str) -> HubResponse {
    (
        status,
        vec![("x-error-code", code.to_owned())],
        b"{}".to_vec(),
    )
}
