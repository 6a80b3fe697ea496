//! `agon doctor`: diagnostics of this machine and this build, for issue reports.
//!
//! Every line begins with `ok`, `warn` or `fail`. With a warning, runs are slower or need other settings; with a
//! failure, no run can start.

use std::{
    fmt::{self, Write as _},
    fs::{self, File},
    io::{self, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{self, ExitCode},
};

use anyhow::Context;
use model::{DType, Device, ModelError};
use telemetry::{Machine, describe_machine};

use crate::exit_code::Code;

/// Less memory or disk space than this is a warning, in bytes.
const LOW_BYTES: u64 = 1 << 30;

/// Diagnose this machine and this build, for issue reports.
///
/// Reports the build, the system, the processor, memory and disk space, opens the devices, measures matrix
/// multiplication for a second, tries what every run needs (reading the default configuration, binding a port
/// on loopback, writing a file), and reports the settings of the Hugging Face Hub. Leaves no file and sends no
/// request. Exit code 0 unless a line begins with `fail`.
///
/// Example: agon doctor
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut output = io::stdout().lock();
    let mut is_usable = true;
    for diagnostic in diagnostics() {
        is_usable &= diagnostic.severity != Severity::Fail;
        writeln!(output, "{diagnostic}").context("failed to write to standard output")?;
    }
    Ok(if is_usable {
        ExitCode::SUCCESS
    } else {
        Code::MissingResource.into()
    })
}

/// Severity of a diagnostic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Severity {
    /// No problem, or information.
    Ok,
    /// Runs work, but slower or with other settings.
    Warn,
    /// No run can start.
    Fail,
}

/// One line of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Diagnostic {
    severity: Severity,
    subject: &'static str,
    text: String,
}

impl Diagnostic {
    fn new(severity: Severity, subject: &'static str, text: impl Into<String>) -> Self {
        Self {
            severity,
            subject,
            text: text.into(),
        }
    }

    /// A check that must succeed; its result is the text.
    fn essential<E: fmt::Display>(subject: &'static str, result: Result<String, E>) -> Self {
        match result {
            Ok(text) => Self::new(Severity::Ok, subject, text),
            Err(error) => Self::new(Severity::Fail, subject, error.to_string()),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Ok => "ok",
            Severity::Warn => "warn",
            Severity::Fail => "fail",
        };
        write!(f, "{severity:<5}{:<15}{}", self.subject, self.text)
    }
}

/// All diagnostics, computed lazily in this order.
fn diagnostics() -> impl Iterator<Item = Diagnostic> {
    let machine = describe_machine();
    let immediate = [
        build(),
        Diagnostic::new(Severity::Ok, "system", machine.operating_system.clone()),
        processor(&machine),
        memory(machine.memory_bytes),
    ];
    let slow: [fn() -> Diagnostic; 8] = [
        || disk(telemetry::free_bytes(Path::new("."))),
        || Diagnostic::essential("device cpu", matmul_throughput()),
        || device("cuda", "device cuda"),
        || device("metal", "device metal"),
        || Diagnostic::essential("defaults", defaults()),
        || Diagnostic::essential("loopback port", loopback()),
        hub_settings,
        || writable(Path::new(".")),
    ];
    immediate
        .into_iter()
        .chain(slow.into_iter().map(|check| check()))
}

fn build() -> Diagnostic {
    let version = env!("CARGO_PKG_VERSION");
    let target = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    if cfg!(debug_assertions) {
        let advice = "a debug build, slower than `cargo build --release`";
        return Diagnostic::new(
            Severity::Warn,
            "agon",
            format!("{version} for {target}, {advice}"),
        );
    }
    Diagnostic::new(
        Severity::Ok,
        "agon",
        format!("{version} for {target}, a release build"),
    )
}

fn processor(machine: &Machine) -> Diagnostic {
    let name = machine.cpu_model.as_deref().unwrap_or("not known");
    let mut text = format!("{name}, {} cores", machine.cores);
    if !machine.cpu_features.is_empty() {
        // Writing to a string does not fail.
        write!(text, ", {}", machine.cpu_features.join(" ")).ok();
    }
    let slow = std::env::consts::ARCH == "x86_64" && !machine.cpu_features.contains(&"avx2");
    if slow {
        text += "; without avx2 the fused kernels are not vectorised";
    }
    Diagnostic::new(
        if slow { Severity::Warn } else { Severity::Ok },
        "processor",
        text,
    )
}

fn memory(bytes: Option<u64>) -> Diagnostic {
    amount("memory", bytes, "for this process")
}

fn disk(free: Option<u64>) -> Diagnostic {
    amount("disk", free, "free in the current directory")
}

/// An amount of memory or disk space.
fn amount(subject: &'static str, bytes: Option<u64>, description: &str) -> Diagnostic {
    let Some(bytes) = bytes else {
        return Diagnostic::new(Severity::Warn, subject, "the amount cannot be determined");
    };
    let severity = if bytes < LOW_BYTES {
        Severity::Warn
    } else {
        Severity::Ok
    };
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let gibibytes = bytes as f64 / f64::from(1 << 30);
    Diagnostic::new(
        severity,
        subject,
        format!("{gibibytes:.1} GiB {description}"),
    )
}

/// Throughput of matrix multiplication on the CPU.
fn matmul_throughput() -> anyhow::Result<String> {
    let rate = model::roofline::matmul_flops(&Device::Cpu, DType::F32)? / 1e9;
    let vectors = kernels::vectors().unwrap_or_default();
    Ok(format!(
        "usable, {rate:.1} GFLOP/s in f32 matrix multiplication, {vectors} kernels"
    ))
}

/// Whether a device other than the CPU is available; it is optional.
fn device(name: &str, subject: &'static str) -> Diagnostic {
    let text = match model::device(name) {
        Ok(_) => "usable".to_owned(),
        Err(ModelError::Device { reason, .. }) => {
            format!(
                "not usable: {}",
                reason.lines().next().unwrap_or("no reason is given")
            )
        }
        Err(error) => format!("not usable: {error}"),
    };
    Diagnostic::new(Severity::Ok, subject, text)
}

fn defaults() -> Result<String, settings::SettingsError> {
    settings::resolve("", "the default configuration", &[])?;
    Ok("the default configuration is readable".into())
}

fn loopback() -> io::Result<String> {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    Ok(format!(
        "a port of {} can be bound, for /metrics",
        address.ip()
    ))
}

/// Settings of the Hugging Face Hub; optional, since models can be local folders.
fn hub_settings() -> Diagnostic {
    match hub::describe() {
        Ok(text) => Diagnostic::new(Severity::Ok, "hub", text),
        Err(error) => Diagnostic::new(Severity::Warn, "hub", error.to_string()),
    }
}

/// Whether the current directory is writable; optional, since `run.output_dir` can name another one.
fn writable(directory: &Path) -> Diagnostic {
    let path = directory.join(format!(".agon-doctor-{}", process::id()));
    let tried = File::create_new(&path)
        .and_then(|mut file| file.write_all(b"agon doctor\n"))
        .and_then(|()| fs::remove_file(&path));
    match tried {
        Ok(()) => Diagnostic::new(
            Severity::Ok,
            "directory",
            "the current directory is writable",
        ),
        Err(error) => {
            let advice = "set run.output_dir to another one";
            let text = format!("the current directory is not writable ({error}): {advice}");
            Diagnostic::new(Severity::Warn, "directory", text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_severity_subject_and_text() {
        let cases = [
            (
                amount("disk", Some(3 << 29), "free"),
                "ok   disk           1.5 GiB free",
            ),
            (
                amount("disk", Some(1 << 29), "free"),
                "warn disk           0.5 GiB free",
            ),
            (
                amount("memory", None, ""),
                "warn memory         the amount cannot be determined",
            ),
            (
                Diagnostic::essential("loopback port", Err::<String, _>("taken")),
                "fail loopback port  taken",
            ),
        ];
        for (diagnostic, expected) in cases {
            assert_eq!(diagnostic.to_string(), expected);
        }
    }

    #[test]
    fn a_processor_without_avx2_is_a_warning() {
        let machine = |features: Vec<&'static str>| Machine {
            cores: 2,
            memory_bytes: None,
            operating_system: "Debian".into(),
            cpu_model: Some("Old".into()),
            cpu_features: features,
        };
        let with_avx2 = processor(&machine(vec!["avx2", "fma"]));
        assert_eq!(
            (with_avx2.severity, with_avx2.text.as_str()),
            (Severity::Ok, "Old, 2 cores, avx2 fma")
        );
        let without = processor(&machine(Vec::new()));
        let expected = if cfg!(target_arch = "x86_64") {
            Severity::Warn
        } else {
            Severity::Ok
        };
        assert_eq!(without.severity, expected);
    }

    #[test]
    fn the_check_of_a_directory_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(writable(directory.path()).severity, Severity::Ok);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let refused = writable(&directory.path().join("missing"));
        assert_eq!(refused.severity, Severity::Warn);
        assert!(refused.text.contains("run.output_dir"), "{}", refused.text);
    }

    #[test]
    fn essential_checks_succeed_on_the_test_machine() {
        assert_eq!(defaults().unwrap(), "the default configuration is readable");
        assert!(loopback().unwrap().contains("127.0.0.1"));
        assert!(device("abacus", "device").text.contains("not usable"));
        let free = disk(telemetry::free_bytes(Path::new(".")));
        assert!(
            free.text.ends_with("GiB free in the current directory"),
            "{free}"
        );
    }
}
