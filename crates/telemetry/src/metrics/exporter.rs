//! Prometheus exporter of this process.
//!
//! A process has one global recorder, which collects the metrics of all threads, and one exporter, which serves
//! them over HTTP. This part does not know which metrics exist, only the histogram buckets of seconds and steps.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::http::{AccessControl, is_exposed, read_token};
use crate::server::HttpServer;
use crate::{
    error::TelemetryError,
    metrics::{registry, stage, waits},
};

/// Bucket bounds of every `…_seconds` histogram, from 1 ms to 1000 s.
const SECONDS_BUCKETS: [f64; 13] = [
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0,
];

/// Bucket bounds of ages in learner steps.
const STEPS_BUCKETS: [f64; 10] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0];

/// Interval at which recorded histogram samples are aggregated into buckets when nothing scrapes the exporter; until
/// then each sample takes memory.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Content type of the Prometheus text exposition format.
const EXPOSITION_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders the current metrics of one or several processes in the text exposition format.
pub type MetricsPage = Arc<dyn Fn() -> String + Send + Sync>;

/// Scrape targets of all processes of a run, in Prometheus' HTTP service discovery format; set once known.
type TargetsPage = Arc<OnceLock<MetricsPage>>;

const PROCESS_START: &str = "process_start_time_seconds";

static STARTED: AtomicBool = AtomicBool::new(false);

/// HTTP exporter of this process's metrics; it serves until dropped.
pub struct Exporter {
    server: HttpServer,
    handle: PrometheusHandle,
    targets: TargetsPage,
    _upkeep: Upkeep,
}

/// Metrics recorded without a server, for tests: those that the closure of [`Self::during`] publishes on its
/// thread.
pub struct Recording {
    recorder: PrometheusRecorder,
}

impl Exporter {
    /// Installs the global recorder and serves `http://listen/metrics` from threads of its own; port 0 picks a free
    /// port. Requests must show the token in the file at `token_path`; with an empty path they must come from this
    /// machine. The recorder stays installed for the life of the process.
    ///
    /// # Errors
    /// When the address is not loopback and there is no token, the token cannot be read, the address cannot be bound,
    /// the process already has a recorder, or a thread cannot be spawned. Only success installs the recorder.
    pub fn start(listen: SocketAddr, token_path: &Path) -> Result<Self, TelemetryError> {
        // Checked first: a second start usually also finds its own address in use.
        if STARTED.load(Ordering::Acquire) {
            return Err(TelemetryError::RecorderInstalled);
        }
        let token = read_token(token_path)?;
        require_protection(listen, token.as_deref())?;
        let access = AccessControl::new(token.as_deref());
        let recorder = build_recorder();
        let handle = recorder.handle();
        let bind_error = |source| TelemetryError::Listen {
            address: listen,
            source,
        };
        let targets = Arc::default();
        let router = router(handle.clone(), Arc::clone(&targets), access);
        let server = HttpServer::start("exporter", listen, bind_error, router, async {})?;
        let upkeep = Upkeep::start(handle.clone())?;
        metrics::set_global_recorder(recorder).map_err(|_| TelemetryError::RecorderInstalled)?;
        publish_start_time();
        STARTED.store(true, Ordering::Release);
        Ok(Self {
            server,
            handle,
            targets,
            _upkeep: upkeep,
        })
    }

    /// Checks that metrics can be served at the address with this token now.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn check(listen: SocketAddr, token: Option<&str>) -> Result<(), TelemetryError> {
        require_protection(listen, token)?;
        let bind_error = |source| TelemetryError::Listen {
            address: listen,
            source,
        };
        TcpListener::bind(listen).map(drop).map_err(bind_error)
    }

    /// A recorder without a server that is not the global one; each test has its own.
    #[must_use]
    pub fn recorder_only() -> Recording {
        Recording {
            recorder: build_recorder(),
        }
    }

    /// The bound address: with port 0, with the port that was chosen.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Serves `page` at `/targets` from now on: the scrape targets of all processes of the run, in Prometheus' HTTP
    /// service discovery format. Later calls have no effect.
    pub fn set_targets(&self, page: MetricsPage) {
        self.targets.set(page).ok();
    }

    /// The current metrics in the text exposition format.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// A function that renders the current metrics, for the live page.
    #[must_use]
    pub fn page(&self) -> MetricsPage {
        let handle = self.handle.clone();
        Arc::new(move || handle.render())
    }
}

impl Recording {
    /// Runs `work` and records the metrics that it publishes on this thread.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        metrics::with_local_recorder(&self.recorder, work)
    }

    /// The metrics recorded so far in the text exposition format.
    #[must_use]
    pub fn render(&self) -> String {
        self.recorder.handle().render()
    }
}

/// Checks that the address is loopback or a token is set.
fn require_protection(listen: SocketAddr, token: Option<&str>) -> Result<(), TelemetryError> {
    match is_exposed(listen.ip(), token.is_some()) {
        true => Err(TelemetryError::ExporterExposed { address: listen }),
        false => Ok(()),
    }
}

/// Routes of the exporter. `/healthz` needs no token: it tells nothing but that the process lives.
fn router(handle: PrometheusHandle, targets: TargetsPage, access: AccessControl) -> Router {
    let metrics = move || async move { ([(CONTENT_TYPE, EXPOSITION_TYPE)], handle.render()) };
    let targets = move || async move {
        let page = targets
            .get()
            .ok_or((StatusCode::NOT_FOUND, "see /metrics\n"))?;
        Ok::<_, (StatusCode, &str)>(([(CONTENT_TYPE, "application/json")], page()))
    };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/targets", get(targets))
        .fallback(|| async { (StatusCode::NOT_FOUND, "see /metrics\n") })
        .layer(from_fn_with_state(access, authorize))
        .route("/healthz", get(|| async { "ok\n" }))
}

/// Middleware: checks access.
async fn authorize(State(access): State<AccessControl>, request: Request, next: Next) -> Response {
    let mut response = match access.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => (refusal.status(), format!("{}\n", refusal.message())).into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn build_recorder() -> PrometheusRecorder {
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS_BUCKETS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_steps".into()), &STEPS_BUCKETS)
        })
        .expect("the bucket lists are not empty")
        .build_recorder();
    metrics::with_local_recorder(&recorder, || {
        registry::describe();
        stage::describe();
        waits::describe();
        metrics::describe_gauge!(
            PROCESS_START,
            "start time of the process, in seconds since 1970"
        );
    });
    recorder
}

/// Publishes the start time of the process under Prometheus' conventional name; a change means a restart.
fn publish_start_time() {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    metrics::gauge!(PROCESS_START).set(since_1970.unwrap_or_default().as_secs_f64());
}

/// Thread that aggregates histogram samples into buckets; it stops when this is dropped.
struct Upkeep {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Upkeep {
    fn start(handle: PrometheusHandle) -> Result<Self, TelemetryError> {
        let name = "exporter-upkeep";
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                while stopped.recv_timeout(UPKEEP_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    handle.run_upkeep();
                }
            })
            .map_err(|source| TelemetryError::Thread {
                name: name.into(),
                source,
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed.
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;
    use crate::metrics::registry::publish;

    fn get_page(address: SocketAddr, path: &str, host: &str, header: &str) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{header}\r\n");
        client.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn metrics_are_served_to_this_machine_or_with_a_token() {
        let serve = |token: Option<&str>| {
            let listen = (Ipv4Addr::LOCALHOST, 0).into();
            let bind_error = |source| TelemetryError::Listen {
                address: listen,
                source,
            };
            let handle = build_recorder().handle();
            let router = router(handle, Arc::default(), AccessControl::new(token));
            HttpServer::start("exporter", listen, bind_error, router, async {}).unwrap()
        };
        let (open, closed) = (serve(None), serve(Some("sesame")));
        let bearer = "Authorization: Bearer sesame\r\n";
        for (server, path, host, header, status) in [
            (&open, "/metrics", "127.0.0.1:9", "", "200"),
            (&open, "/metrics", "evil.example", "", "403"),
            (&open, "/targets", "evil.example", "", "403"),
            (&open, "/", "evil.example", "", "403"),
            (
                &open,
                "/metrics",
                "127.0.0.1:9",
                "Origin: http://evil.example\r\n",
                "403",
            ),
            (&closed, "/metrics", "127.0.0.1:9", "", "401"),
            (&closed, "/metrics", "learner:9", "", "401"),
            (&closed, "/metrics", "learner:9", bearer, "200"),
            (&closed, "/healthz", "learner:9", "", "200"),
        ] {
            let answer = get_page(server.address(), path, host, header);
            let expected = format!("HTTP/1.1 {status}");
            assert!(
                answer.starts_with(&expected),
                "{path} {host} {header}: {answer}"
            );
        }
    }

    #[test]
    fn an_address_beyond_loopback_needs_a_token() {
        let listen = "0.0.0.0:0".parse().unwrap();
        let message = Exporter::check(listen, None).unwrap_err().to_string();
        assert!(message.contains("`telemetry.token_path`"), "{message}");
        Exporter::check(listen, Some("sesame")).unwrap();
    }

    // The only test that installs the global recorder.
    #[test]
    fn the_global_exporter_serves_metrics_of_all_threads() {
        let occupied = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let none = Path::new("");
        let busy = Exporter::start(occupied.local_addr().unwrap(), none)
            .err()
            .unwrap();
        assert!(matches!(busy, TelemetryError::Listen { .. }), "{busy}");

        let exporter = Exporter::start((Ipv4Addr::LOCALHOST, 0).into(), none).unwrap();
        let publishing = || {
            publish(
                &[("beta", 0.125)].into_iter().collect(),
                &[("role", "exported")],
            );
        };
        thread::spawn(publishing).join().unwrap();
        let request = |path: &str| get_page(exporter.address(), path, "localhost", "");
        for page in [request("/metrics"), exporter.render()] {
            assert!(
                page.contains("\nagon_beta{role=\"exported\"} 0.125\n"),
                "{page}"
            );
        }

        assert!(request("/").starts_with("HTTP/1.1 404"));
        assert!(request("/targets").starts_with("HTTP/1.1 404"));
        exporter.set_targets(Arc::new(|| "[]".into()));
        let response = request("/targets");
        assert!(
            response.contains("content-type: application/json\r\n"),
            "{response}"
        );
        assert!(response.ends_with("\r\n\r\n[]"), "{response}");

        for listen in [exporter.address(), (Ipv4Addr::LOCALHOST, 0).into()] {
            let second = Exporter::start(listen, none).err().unwrap();
            assert!(
                matches!(second, TelemetryError::RecorderInstalled),
                "{second}"
            );
        }
    }

    #[test]
    fn recordings_are_isolated_from_one_another() {
        let (one, other) = (Exporter::recorder_only(), Exporter::recorder_only());
        one.during(|| publish(&[("tau", 0.5)].into_iter().collect(), &[]));
        assert!(one.render().contains("agon_tau 0.5\n"));
        assert!(!other.render().contains("agon_tau"));
    }
}
