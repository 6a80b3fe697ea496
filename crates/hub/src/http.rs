//! HTTP requests to the Hub.
//!
//! Redirects are followed here and not by the HTTP library, so that the token goes to the endpoint alone: its scheme,
//! host and port. Bodies are read by the caller, who bounds them.

use std::{error::Error as _, time::Duration};

use url::Url;

/// Timeout for connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest number of redirects of one request.
const MAX_REDIRECTS: usize = 10;

/// HTTP client with the Hub's endpoint and the token for it.
pub(crate) struct HttpClient {
    agent: ureq::Agent,
    endpoint: Url,
    /// Sent to the endpoint's origin only.
    token: Option<String>,
}

/// Reason why a request has no usable response.
#[derive(Debug)]
pub(crate) enum RequestFailure {
    /// A server answered with an error.
    Status(Box<ureq::Response>),
    /// A server could not be reached, with the reason.
    Transport(String),
    /// A server redirects to where no request is sent, with the reason.
    Redirect(String),
}

/// A successful response and what its redirects said of the file.
pub(crate) struct FileResponse {
    /// The last response, whose body is unread.
    pub(crate) response: ureq::Response,
    /// Facts on the file that the responses stated.
    pub(crate) headers: FileHeaders,
}

/// Facts about a file in the Hub's headers. The values are as the servers sent them.
#[derive(Debug, Default)]
pub(crate) struct FileHeaders {
    /// Commit of the repository.
    pub(crate) commit: Option<String>,
    /// ETag of the content, of the file that a redirect links to if there is one.
    linked_etag: Option<String>,
    etag: Option<String>,
    /// Size of the content that a redirect links to, in bytes.
    pub(crate) linked_size: Option<u64>,
}

impl HttpClient {
    /// A client of the Hub at `endpoint`; a read that receives nothing for `read_timeout` fails.
    pub(crate) fn new(endpoint: Url, token: Option<String>, read_timeout: Duration) -> Self {
        let agent = ureq::AgentBuilder::new()
            .try_proxy_from_env(true)
            .redirects(0)
            .timeout_connect(CONNECT_TIMEOUT)
            .timeout_read(read_timeout)
            .user_agent(concat!("agon/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent,
            endpoint,
            token,
        }
    }

    /// Response for the resource at these path segments below the endpoint, from the byte `from` on if it is given.
    ///
    /// # Errors
    /// When a server cannot be reached, answers with an error, or redirects more often than ten times, away from HTTPS
    /// or to another scheme.
    pub(crate) fn get(
        &self,
        segments: &[&str],
        from: Option<u64>,
    ) -> Result<FileResponse, RequestFailure> {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        let mut headers = FileHeaders::default();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.request(&url, from)?;
            headers.add(&response);
            match redirect_target(&url, &response)? {
                None => return Ok(FileResponse { response, headers }),
                Some(target) => url = target,
            }
        }
        Err(RequestFailure::Redirect(format!(
            "{} redirects more than {MAX_REDIRECTS} times",
            self.endpoint
        )))
    }

    /// Sends one request, with the token if the URL is of the endpoint's origin.
    fn request(&self, url: &Url, from: Option<u64>) -> Result<ureq::Response, RequestFailure> {
        let mut request = self.agent.request_url("GET", url);
        if let Some(from) = from {
            request = request.set("Range", &format!("bytes={from}-"));
        }
        let is_endpoint = url.origin() == self.endpoint.origin();
        let token = self.token.as_deref().filter(|_| is_endpoint);
        tracing::debug!(
            url = without_query(url),
            sends_token = token.is_some(),
            "sending a request"
        );
        if let Some(token) = token {
            request = request.set("Authorization", &format!("Bearer {token}"));
        }
        request.call().map_err(|error| match error {
            ureq::Error::Status(_, response) => RequestFailure::Status(Box::new(response)),
            ureq::Error::Transport(error) => RequestFailure::Transport(describe(url, &error)),
        })
    }
}

/// Target of a redirection; `None` if it is no redirect.
fn redirect_target(url: &Url, response: &ureq::Response) -> Result<Option<Url>, RequestFailure> {
    if !(300..400).contains(&response.status()) {
        return Ok(None);
    }
    let refused = |reason: &str| {
        let from = without_query(url);
        RequestFailure::Redirect(format!("{from} redirects {reason}"))
    };
    let location = response
        .header("location")
        .ok_or_else(|| refused("to nowhere"))?;
    let target = url.join(location);
    let target = target.map_err(|_| refused("to what is no URL"))?;
    match (url.scheme(), target.scheme()) {
        ("https" | "http", "https") | ("http", "http") => Ok(Some(target)),
        ("https", "http") => Err(refused("away from HTTPS")),
        (_, other) => Err(refused(&format!(
            "to the scheme {other:?}, which is not HTTP"
        ))),
    }
}

impl FileHeaders {
    /// Adds what a response says; its own ETag replaces that of the redirect before it.
    fn add(&mut self, response: &ureq::Response) {
        let header = |name: &str| response.header(name).map(str::to_owned);
        let first = |known: &mut Option<String>, name: &str| *known = known.take().or(header(name));
        first(&mut self.commit, "x-repo-commit");
        first(&mut self.linked_etag, "x-linked-etag");
        self.etag = header("etag").or(self.etag.take());
        let size = header("x-linked-size").and_then(|size| size.parse().ok());
        self.linked_size = self.linked_size.or(size);
    }

    /// ETag of the content without quotes and the mark of a weak one; not yet validated.
    pub(crate) fn etag(&self) -> Option<&str> {
        let etag = self.linked_etag.as_deref().or(self.etag.as_deref())?;
        let etag = etag.trim();
        Some(etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"'))
    }
}

/// A transport error without the query of its URL, which may be signed.
fn describe(url: &Url, error: &ureq::Transport) -> String {
    let mut text = format!("{}: {}", without_query(url), error.kind());
    let source = error.source().map(ToString::to_string);
    for part in error.message().map(str::to_owned).into_iter().chain(source) {
        text.push_str(": ");
        text.push_str(&part);
    }
    text
}

/// A URL as text without its query and user information.
pub(crate) fn without_query(url: &Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}
