//! Process-wide settings, applied before any other thread exists: of malloc, of candle's thread pool, of file descriptors
//! and of new files' permissions.

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};

/// Makes the files that this process creates readable by their owner only: a run's logs, checkpoints and samples.
pub(crate) fn keep_files_private() {
    umask(Mode::RWXG | Mode::RWXO);
}

/// Applies all settings.
pub(crate) fn apply() {
    keep_freed_pages();
    limit_candle_threads();
    raise_descriptor_limit();
}

/// Raises the number of files that this process may open to what the system allows it.
///
/// Many systems start processes with 1024, of which connections could take all. If this fails the limit stays as it
/// is, and listeners take fewer connections.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).ok();
}

/// Makes malloc keep freed pages instead of returning them to the system, with one arena per core.
///
/// Training frees and allocates the same tensors every step; by default malloc makes of many a fresh mapping, whose page
/// faults cost as much time as the arithmetic. Those above a mebibyte do not come here (see [`crate::allocator`]). An
/// arena keeps its peak size, so there should be few of them; with a single one threads contend for its lock. Only glibc
/// has these options; elsewhere this does nothing.
fn keep_freed_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "an option of the C library")]
        // SAFETY: called before any other thread exists; mallopt only sets parameters of malloc.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
            libc::mallopt(libc::M_TOP_PAD, HEAP_STEP);
            if std::env::var_os("MALLOC_ARENA_MAX").is_none()
                && let Ok(cores) = std::thread::available_parallelism()
                && let Ok(cores) = cores.get().try_into()
            {
                libc::mallopt(libc::M_ARENA_MAX, cores);
            }
        }
    }
}

/// Address space by which a heap grows, in bytes. Heaps that grow by less than huge pages have none.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAP_STEP: i32 = 64 << 20;

/// Limits candle's thread pool to one thread, unless `CANDLE_NUM_THREADS` is set.
///
/// candle runs elementwise operations on a pool of its own whose threads busy-wait; beside rayon's one thread per
/// core they slow down the matrix products. Few operations here use that pool.
fn limit_candle_threads() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        #[expect(unsafe_code, reason = "candle reads it from the environment")]
        // SAFETY: called before any other thread exists, so nothing reads the environment concurrently.
        unsafe {
            std::env::set_var(THREADS, "1");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_limit_is_raised_to_its_maximum() {
        raise_descriptor_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
