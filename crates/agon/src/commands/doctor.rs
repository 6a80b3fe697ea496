//! `agon doctor`: what this machine and this build have, in lines to paste into an issue.
//!
//! Every line begins with `ok`, `warn` or `fail`. A warning costs speed or comfort; a failure is something
//! that no run can do without.

use std::{
    fmt::{self, Write as _},
    fs::{self, File},
    io::{self, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{self, Command, ExitCode},
};

use anyhow::Context;
use model::ModelError;
use telemetry::{Machine, describe_machine};

use crate::{failure::Code, model_hub};

/// Less memory or disk than this is said aloud.
const SCANT_BYTES: u64 = 1 << 30;

/// What this machine and this build have, to paste into an issue.
///
/// Looks at the build, the system, the processor, memory and disk, tries the devices, measures matrix
/// products for a second, does once what every run does (read the default configuration, bind a port
/// on loopback, write a file), and says where models of the hub come from. Nothing is kept, nobody
/// asked. Exit code 0 unless a line begins with `fail`.
///
/// Example: agon doctor
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut output = io::stdout().lock();
    let mut sound = true;
    for finding in findings() {
        sound &= finding.grade != Grade::Fail;
        writeln!(output, "{finding}").context("failed to write to standard output")?;
    }
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        Code::MissingResource.into()
    })
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    /// As it should be, or good to know.
    Ok,
    /// Runs work, but slower or less comfortably.
    Warn,
    /// No run works.
    Fail,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    grade: Grade,
    subject: &'static str,
    text: String,
}

impl Finding {
    fn new(grade: Grade, subject: &'static str, text: impl Into<String>) -> Self {
        Self {
            grade,
            subject,
            text: text.into(),
        }
    }

    /// What must work, with what it gave.
    fn essential<E: fmt::Display>(subject: &'static str, tried: Result<String, E>) -> Self {
        match tried {
            Ok(text) => Self::new(Grade::Ok, subject, text),
            Err(error) => Self::new(Grade::Fail, subject, error.to_string()),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grade = match self.grade {
            Grade::Ok => "ok",
            Grade::Warn => "warn",
            Grade::Fail => "fail",
        };
        write!(f, "{grade:<5}{:<15}{}", self.subject, self.text)
    }
}

/// All of them, one after the other, as they are found.
fn findings() -> impl Iterator<Item = Finding> {
    let machine = describe_machine();
    let first = [
        build(),
        Finding::new(Grade::Ok, "system", machine.operating_system.clone()),
        processor(&machine),
        memory(machine.memory_bytes),
    ];
    let tried: [fn() -> Finding; 8] = [
        || disk(free_bytes()),
        || Finding::essential("device cpu", matrix_products()),
        || device("cuda", "device cuda"),
        || device("metal", "device metal"),
        || Finding::essential("defaults", defaults()),
        || Finding::essential("loopback port", loopback()),
        models_of_the_hub,
        || writable(Path::new(".")),
    ];
    first
        .into_iter()
        .chain(tried.into_iter().map(|find| find()))
}

fn build() -> Finding {
    let version = env!("CARGO_PKG_VERSION");
    let target = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    if cfg!(debug_assertions) {
        let advice = "a debug build, slower than `cargo build --release`";
        return Finding::new(
            Grade::Warn,
            "agon",
            format!("{version} for {target}, {advice}"),
        );
    }
    Finding::new(
        Grade::Ok,
        "agon",
        format!("{version} for {target}, a release build"),
    )
}

fn processor(machine: &Machine) -> Finding {
    let name = machine.cpu_model.as_deref().unwrap_or("not known");
    let mut text = format!("{name}, {} cores", machine.cores);
    if !machine.cpu_features.is_empty() {
        // Writing to a string does not fail.
        write!(text, ", {}", machine.cpu_features.join(" ")).ok();
    }
    let slow = std::env::consts::ARCH == "x86_64" && !machine.cpu_features.contains(&"avx2");
    if slow {
        text += "; without avx2 the fused operations run one number at a time";
    }
    Finding::new(
        if slow { Grade::Warn } else { Grade::Ok },
        "processor",
        text,
    )
}

fn memory(bytes: Option<u64>) -> Finding {
    amount("memory", bytes, "for this process")
}

fn disk(free: Option<u64>) -> Finding {
    amount("disk", free, "free in the current directory")
}

/// So many bytes of something, or that the system does not tell.
fn amount(subject: &'static str, bytes: Option<u64>, of_what: &str) -> Finding {
    let Some(bytes) = bytes else {
        return Finding::new(Grade::Warn, subject, "the system does not tell how much");
    };
    let grade = if bytes < SCANT_BYTES {
        Grade::Warn
    } else {
        Grade::Ok
    };
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let gibibytes = bytes as f64 / f64::from(1 << 30);
    Finding::new(grade, subject, format!("{gibibytes:.1} GiB {of_what}"))
}

/// Bytes free for this user where the current directory lies, as POSIX `df` says.
fn free_bytes() -> Option<u64> {
    let output = Command::new("df").args(["-P", "-k", "."]).output().ok()?;
    available(&String::from_utf8_lossy(&output.stdout))
}

/// The bytes available in the answer of `df -P -k`: the column before the one in per cent.
fn available(answer: &str) -> Option<u64> {
    let fields: Vec<&str> = answer.lines().nth(1)?.split_whitespace().collect();
    let used = fields.iter().position(|field| field.ends_with('%'))?;
    fields[used.checked_sub(1)?]
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// That the processor computes, and how fast.
fn matrix_products() -> anyhow::Result<String> {
    let rate = model::roofline::products()? / 1e9;
    let vectors = model::ops::vectors().unwrap_or_default();
    Ok(format!(
        "usable, {rate:.1} GFLOP/s in f32 matrix products, own loops for {vectors}"
    ))
}

/// Whether a device other than the processor can be had; most machines and builds do without.
fn device(name: &str, subject: &'static str) -> Finding {
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
    Finding::new(Grade::Ok, subject, text)
}

fn defaults() -> Result<String, settings::SettingsError> {
    settings::resolve("", "the default configuration", &[])?;
    Ok("the default configuration can be read".into())
}

fn loopback() -> io::Result<String> {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    Ok(format!("{} can be bound, for /metrics", address.ip()))
}

/// Folders can be lived with, so nothing here ends a run.
fn models_of_the_hub() -> Finding {
    match model_hub::describe() {
        Ok(text) => Finding::new(Grade::Ok, "hub", text),
        Err(error) => Finding::new(Grade::Warn, "hub", error.to_string()),
    }
}

/// Runs go to `runs/` unless they are told otherwise, so this can be lived without.
fn writable(directory: &Path) -> Finding {
    let path = directory.join(format!(".agon-doctor-{}", process::id()));
    let tried = File::create_new(&path)
        .and_then(|mut file| file.write_all(b"agon doctor\n"))
        .and_then(|()| fs::remove_file(&path));
    match tried {
        Ok(()) => Finding::new(Grade::Ok, "directory", "the current directory is writable"),
        Err(error) => {
            let advice = "name another with run.output_dir";
            let text = format!("the current directory is not writable ({error}): {advice}");
            Finding::new(Grade::Warn, "directory", text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_df_is_read_from_its_percentage() {
        let heading = "Filesystem 1024-blocks Used Available Capacity Mounted on\n";
        let cases = [
            ("/dev/sda1 100 60 40 60% /\n", Some(40 * 1024)),
            ("a name 100 60 7 93% /with a space\n", Some(7 * 1024)),
            ("/dev/sda1 100 60 40 - /\n", None),
            ("50% /\n", None),
            ("/dev/sda1 100 60 many 60% /\n", None),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(available(&format!("{heading}{line}")), expected, "{line:?}");
        }
    }

    #[test]
    fn a_line_has_its_grade_its_subject_and_its_text() {
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
                "warn memory         the system does not tell how much",
            ),
            (
                Finding::essential("loopback port", Err::<String, _>("taken")),
                "fail loopback port  taken",
            ),
        ];
        for (finding, expected) in cases {
            assert_eq!(finding.to_string(), expected);
        }
    }

    #[test]
    fn a_processor_without_wide_registers_is_warned_about() {
        let machine = |features: Vec<&'static str>| Machine {
            cores: 2,
            memory_bytes: None,
            operating_system: "Debian".into(),
            cpu_model: Some("Old".into()),
            cpu_features: features,
        };
        let wide = processor(&machine(vec!["avx2", "fma"]));
        assert_eq!(
            (wide.grade, wide.text.as_str()),
            (Grade::Ok, "Old, 2 cores, avx2 fma")
        );
        let narrow = processor(&machine(Vec::new()));
        let expected = if cfg!(target_arch = "x86_64") {
            Grade::Warn
        } else {
            Grade::Ok
        };
        assert_eq!(narrow.grade, expected);
    }

    #[test]
    fn a_directory_is_tried_and_left_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(writable(directory.path()).grade, Grade::Ok);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let refused = writable(&directory.path().join("missing"));
        assert_eq!(refused.grade, Grade::Warn);
        assert!(refused.text.contains("run.output_dir"), "{}", refused.text);
    }

    #[test]
    fn what_every_run_needs_works_where_the_tests_run() {
        assert_eq!(defaults().unwrap(), "the default configuration can be read");
        assert!(loopback().unwrap().starts_with("127.0.0.1"));
        assert!(device("abacus", "device").text.contains("not usable"));
    }
}
