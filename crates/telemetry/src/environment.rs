//! Hardware and operating system of this process, for `agon doctor` and for reports.
//!
//! Every value is read from the operating system; a value that it does not provide is absent, never guessed.

use std::fmt;
use std::fs;
use std::path::Path;
use std::thread;

use serde::Serialize;

/// Description of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Number of cores available to this process.
    pub cores: usize,
    /// Memory available to this process, in bytes: the machine's, or the cgroup limit where that is lower.
    pub memory_bytes: Option<u64>,
    /// Name and version of the operating system, as far as known, and the architecture.
    pub operating_system: String,
    /// Model name of the processor.
    pub cpu_model: Option<String>,
    /// SIMD extensions of the processor that matter for matrix products.
    pub cpu_features: Vec<&'static str>,
}

/// Peak resident set size of this process, in bytes; Linux only.
#[must_use]
pub fn peak_memory_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// Free space on the file system of `path`, in bytes, as available to unprivileged users.
#[must_use]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

/// Queries the operating system for the description of this machine.
#[must_use]
pub fn describe_machine() -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Machine {
        cores: thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory_bytes(&read("/proc/meminfo"), &read("/sys/fs/cgroup/memory.max")),
        operating_system: operating_system(
            &read("/etc/os-release"),
            &read("/proc/sys/kernel/osrelease"),
        ),
        cpu_model: field(&read("/proc/cpuinfo"), "model name", ':').map(str::to_owned),
        cpu_features: cpu_features(),
    }
}

/// The value of the first line `key : value` with this key.
fn field<'a>(text: &'a str, key: &str, separator: char) -> Option<&'a str> {
    let mut fields = text.lines().filter_map(|line| line.split_once(separator));
    fields
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim())
}

fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let value = field(text, key, ':')?.strip_suffix("kB")?;
    value.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn memory_bytes(meminfo: &str, container_limit: &str) -> Option<u64> {
    let limit = container_limit.trim().parse().ok();
    kibibytes(meminfo, "MemTotal")
        .into_iter()
        .chain(limit)
        .min()
}

fn operating_system(os_release: &str, kernel: &str) -> String {
    let name = field(os_release, "PRETTY_NAME", '=').map(|name| name.trim_matches('"'));
    let name = name.unwrap_or(std::env::consts::OS);
    [name, kernel.trim(), std::env::consts::ARCH]
        .join(" ")
        .replace("  ", " ")
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let features = [
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("f16c", has!("f16c")),
        ("avx512f", has!("avx512f")),
        ("avx512bw", has!("avx512bw")),
        ("avx512vnni", has!("avx512vnni")),
        ("avx512bf16", has!("avx512bf16")),
    ];
    features
        .into_iter()
        .filter(|&(_, has)| has)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<&'static str> {
    use std::arch::is_aarch64_feature_detected as has;
    let features = [
        ("neon", has!("neon")),
        ("fp16", has!("fp16")),
        ("dotprod", has!("dotprod")),
        ("bf16", has!("bf16")),
        ("i8mm", has!("i8mm")),
        ("sve", has!("sve")),
    ];
    features
        .into_iter()
        .filter(|&(_, has)| has)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = || "not known".to_owned();
        #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
        let gibibytes = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        writeln!(f, "system    {}", self.operating_system)?;
        writeln!(
            f,
            "processor {}",
            self.cpu_model.clone().unwrap_or_else(unknown)
        )?;
        writeln!(f, "cores     {}", self.cores)?;
        writeln!(f, "features  {}", self.cpu_features.join(" "))?;
        write!(
            f,
            "memory    {}",
            self.memory_bytes.map_or_else(unknown, gibibytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed_in_kibibytes() {
        let status = "Name:\tagon\nVmPeak:\t  99 kB\nVmHWM:\t    1536 kB\nVmRSS:\t  12 kB\n";
        let cases = [
            (status, Some(1536 * 1024)),
            ("VmHWM:\t many kB\n", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(kibibytes(text, "VmHWM"), expected, "{text:?}");
        }
    }

    #[test]
    fn memory_is_the_minimum_of_machine_and_cgroup_limit() {
        let meminfo = "MemTotal:       4096 kB\nMemFree:  1 kB\n";
        let cases = [
            (meminfo, "", Some(4_194_304)),
            (meminfo, "max\n", Some(4_194_304)),
            (meminfo, "1048576\n", Some(1_048_576)),
            (meminfo, "9223372036854771712\n", Some(4_194_304)),
            ("", "", None),
        ];
        for (machine, container, expected) in cases {
            assert_eq!(
                memory_bytes(machine, container),
                expected,
                "{machine:?} {container:?}"
            );
        }
    }

    #[test]
    fn the_operating_system_is_named_even_without_release_files() {
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        let release = "NAME=\"Debian\"\nPRETTY_NAME=\"Debian 12\"\n";
        let cases = [
            (release, "6.1.0\n", format!("Debian 12 6.1.0 {arch}")),
            ("", "", format!("{os} {arch}")),
        ];
        for (release, kernel, expected) in cases {
            assert_eq!(operating_system(release, kernel), expected);
        }
    }

    #[test]
    fn a_machine_is_displayed_as_a_table() {
        let machine = Machine {
            cores: 2,
            memory_bytes: Some(3 << 29),
            operating_system: "Debian 12 x86_64".into(),
            cpu_model: None,
            cpu_features: vec!["avx2", "fma"],
        };
        assert_eq!(
            machine.to_string(),
            "system    Debian 12 x86_64\nprocessor not known\ncores     2\n\
             features  avx2 fma\nmemory    1.5 GiB"
        );
    }

    #[test]
    fn free_space_of_a_missing_path_is_none() {
        let directory = tempfile::tempdir().unwrap();
        assert!(free_bytes(directory.path()).unwrap() > 4096);
        assert_eq!(free_bytes(&directory.path().join("none")), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_reports_memory_and_cores() {
        let machine = describe_machine();
        let peak = peak_memory_bytes().unwrap();
        assert!(peak > 100 * 1024, "{peak} bytes are too few for a process");
        assert!(machine.memory_bytes.unwrap() > peak);
        assert!(machine.cores >= 1);
    }
}
