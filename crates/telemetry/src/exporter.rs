//! The process's metrics as a Prometheus page.
//!
//! A process has one recorder, which takes in what every thread publishes, and one exporter, which
//! shows it. This part does not know which metrics there are beyond how a time is best divided.

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

use crate::server::Server;
use crate::{Error, MetricsPage, registry, station, waits};

/// The upper ends of the buckets of every `…_seconds` histogram: from a fused operation to a hang.
const SECONDS_BUCKETS: [f64; 13] = [
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0,
];

/// The upper ends of the buckets of ages in learner steps: every bound that is in use, and beyond.
const STEPS_BUCKETS: [f64; 10] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0];

/// How often recorded times are folded into their buckets when no one asks for the page; until then
/// each of them takes memory.
const UPKEEP: Duration = Duration::from_secs(5);

/// The form of the page of metrics.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Says where all processes of a run are, once somebody knows.
type Targets = Arc<OnceLock<MetricsPage>>;

const PROCESS_START: &str = "process_start_time_seconds";

static STARTED: AtomicBool = AtomicBool::new(false);

/// The page of this process's metrics, served over HTTP until this is dropped.
pub struct Exporter {
    server: Server,
    handle: PrometheusHandle,
    targets: Targets,
    _upkeep: Upkeep,
}

/// Metrics recorded without a server, for tests: only what is published [during](Self::during) a
/// closure, on its thread.
pub struct Recording {
    recorder: PrometheusRecorder,
}

impl Exporter {
    /// Installs the process's recorder and serves its page at `http://listen/metrics` from threads
    /// of its own; port 0 takes a free port. The recorder stays for the life of the process.
    ///
    /// # Errors
    /// When the address cannot be listened on, when the process has a recorder already, or when it
    /// may start no more threads. Only success installs the recorder.
    pub fn start(listen: SocketAddr) -> Result<Self, Error> {
        // Said first, because a second start is likely to find its own address taken.
        if STARTED.load(Ordering::Acquire) {
            return Err(Error::RecorderInstalled);
        }
        let recorder = build_recorder();
        let handle = recorder.handle();
        let refused = |source| Error::Listen {
            address: listen,
            source,
        };
        let targets = Arc::default();
        let router = router(handle.clone(), Arc::clone(&targets));
        let server = Server::start("exporter", listen, refused, router, async {})?;
        let upkeep = Upkeep::start(handle.clone())?;
        metrics::set_global_recorder(recorder).map_err(|_| Error::RecorderInstalled)?;
        tell_start();
        STARTED.store(true, Ordering::Release);
        Ok(Self {
            server,
            handle,
            targets,
            _upkeep: upkeep,
        })
    }

    /// Whether the address can be listened on now.
    ///
    /// # Errors
    /// When it cannot, as [`Self::start`].
    pub fn check(listen: SocketAddr) -> Result<(), Error> {
        let refused = |source| Error::Listen {
            address: listen,
            source,
        };
        TcpListener::bind(listen).map(drop).map_err(refused)
    }

    /// A recorder without a server that is not the process's: tests have one each.
    #[must_use]
    pub fn recorder_only() -> Recording {
        Recording {
            recorder: build_recorder(),
        }
    }

    /// Where the page is served: with port 0, the port that was free.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Says from here on at `/targets` where all processes of a run are, as Prometheus' HTTP service
    /// discovery reads it.
    pub fn tell_targets(&self, page: MetricsPage) {
        self.targets.set(page).ok();
    }

    /// The page as it would be served now.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Makes that page, for whoever shows this process.
    #[must_use]
    pub fn page(&self) -> MetricsPage {
        let handle = self.handle.clone();
        Arc::new(move || handle.render())
    }
}

impl Recording {
    /// Runs `work`, recording what it publishes on this thread.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        metrics::with_local_recorder(&self.recorder, work)
    }

    /// The page of what was recorded so far.
    #[must_use]
    pub fn render(&self) -> String {
        self.recorder.handle().render()
    }
}

/// What Prometheus may ask.
fn router(handle: PrometheusHandle, targets: Targets) -> Router {
    let metrics = move || async move { ([(CONTENT_TYPE, TEXT)], handle.render()) };
    let told = move || async move {
        let page = targets
            .get()
            .ok_or((StatusCode::NOT_FOUND, "see /metrics\n"))?;
        Ok::<_, (StatusCode, &str)>(([(CONTENT_TYPE, "application/json")], page()))
    };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/targets", get(told))
        .fallback(|| async { (StatusCode::NOT_FOUND, "see /metrics\n") })
}

fn build_recorder() -> PrometheusRecorder {
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS_BUCKETS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_steps".into()), &STEPS_BUCKETS)
        })
        .expect("there are buckets")
        .build_recorder();
    metrics::with_local_recorder(&recorder, || {
        registry::describe();
        station::describe();
        waits::describe();
        metrics::describe_gauge!(
            PROCESS_START,
            "when the process began, in seconds since 1970"
        );
    });
    recorder
}

/// When this process began to tell, under the name that every exporter of the field uses: a change of it
/// is a restart.
fn tell_start() {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    metrics::gauge!(PROCESS_START).set(since_1970.unwrap_or_default().as_secs_f64());
}

/// The thread that folds times into buckets; it ends when this is dropped.
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
                while stopped.recv_timeout(UPKEEP) == Err(RecvTimeoutError::Timeout) {
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
            // A thread that panicked has said so itself.
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;
    use crate::publish;

    // The one test that installs the process's recorder.
    #[test]
    fn a_process_has_one_exporter_that_shows_what_any_thread_publishes() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let busy = Exporter::start(taken.local_addr().unwrap()).err().unwrap();
        assert!(matches!(busy, Error::Listen { .. }), "{busy}");

        let exporter = Exporter::start((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let publishing = || {
            publish(
                &[("beta", 0.125)].into_iter().collect(),
                &[("role", "exported")],
            );
        };
        thread::spawn(publishing).join().unwrap();
        let ask = |path: &str| {
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
        for page in [ask("/metrics"), exporter.render()] {
            assert!(
                page.contains("\nagon_beta{role=\"exported\"} 0.125\n"),
                "{page}"
            );
        }

        assert!(ask("/").starts_with("HTTP/1.1 404"));
        assert!(ask("/targets").starts_with("HTTP/1.1 404"));
        exporter.tell_targets(Arc::new(|| "[]".into()));
        let told = ask("/targets");
        assert!(
            told.contains("content-type: application/json\r\n"),
            "{told}"
        );
        assert!(told.ends_with("\r\n\r\n[]"), "{told}");

        for listen in [exporter.address(), (Ipv4Addr::LOCALHOST, 0).into()] {
            let second = Exporter::start(listen).err().unwrap();
            assert!(matches!(second, Error::RecorderInstalled), "{second}");
        }
    }

    #[test]
    fn recordings_see_their_own_metrics_only() {
        let (one, other) = (Exporter::recorder_only(), Exporter::recorder_only());
        one.during(|| publish(&[("tau", 0.5)].into_iter().collect(), &[]));
        assert!(one.render().contains("agon_tau 0.5\n"));
        assert!(!other.render().contains("agon_tau"));
    }
}
