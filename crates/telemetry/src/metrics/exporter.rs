//! Prometheus exporter of this process.
//!
//! A process has one global recorder, which collects the metrics of all threads, and one exporter, which serves
//! them over HTTP. This part does not know which metrics exist, only the histogram buckets of seconds and steps.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::routing::get;
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::server::HttpServer;
use crate::{
    error::Error,
    metrics::{registry, stage, waits},
    page::MetricsPage,
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
    /// port. The recorder stays installed for the life of the process.
    ///
    /// # Errors
    /// When the address cannot be bound, the process already has a recorder, or a thread cannot be spawned. Only
    /// success installs the recorder.
    pub fn start(listen: SocketAddr) -> Result<Self, Error> {
        // Checked first: a second start usually also finds its own address in use.
        if STARTED.load(Ordering::Acquire) {
            return Err(Error::RecorderInstalled);
        }
        let recorder = build_recorder();
        let handle = recorder.handle();
        let bind_error = |source| Error::Listen {
            address: listen,
            source,
        };
        let targets = Arc::default();
        let router = router(handle.clone(), Arc::clone(&targets));
        let server = HttpServer::start("exporter", listen, bind_error, router, async {})?;
        let upkeep = Upkeep::start(handle.clone())?;
        metrics::set_global_recorder(recorder).map_err(|_| Error::RecorderInstalled)?;
        publish_start_time();
        STARTED.store(true, Ordering::Release);
        Ok(Self {
            server,
            handle,
            targets,
            _upkeep: upkeep,
        })
    }

    /// Checks that the address can be bound now.
    ///
    /// # Errors
    /// When it cannot, as [`Self::start`].
    pub fn check(listen: SocketAddr) -> Result<(), Error> {
        let bind_error = |source| Error::Listen {
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

/// Routes of the exporter.
fn router(handle: PrometheusHandle, targets: TargetsPage) -> Router {
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
    fn start(handle: PrometheusHandle) -> Result<Self, Error> {
        let name = "exporter-upkeep";
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                while stopped.recv_timeout(UPKEEP_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    handle.run_upkeep();
                }
            })
            .map_err(|source| Error::Thread {
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

    // The only test that installs the global recorder.
    #[test]
    fn the_global_exporter_serves_metrics_of_all_threads() {
        let occupied = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let busy = Exporter::start(occupied.local_addr().unwrap())
            .err()
            .unwrap();
        assert!(matches!(busy, Error::Listen { .. }), "{busy}");

        let exporter = Exporter::start((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let publishing = || {
            publish(
                &[("beta", 0.125)].into_iter().collect(),
                &[("role", "exported")],
            );
        };
        thread::spawn(publishing).join().unwrap();
        let request = |path: &str| {
            let mut client = TcpStream::connect(exporter.address()).unwrap();
            write!(
                client,
                "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )
            .unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            answer
        };
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
            let second = Exporter::start(listen).err().unwrap();
            assert!(matches!(second, Error::RecorderInstalled), "{second}");
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
