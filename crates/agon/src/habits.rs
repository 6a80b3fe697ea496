//! Habits of libraries, set once at the start, before any other thread exists.

/// Sets them all.
pub(crate) fn set() {
    keep_pages();
    one_pool();
}

/// Keeps freed pages instead of returning them to the system, in as many arenas as there are cores.
///
/// Training frees and allocates the same large tensors every step; by default each is a fresh mapping
/// whose pages fault in one by one, which costs as much time as the arithmetic. An arena keeps the most it
/// ever held, so there should be few; with a single one threads wait for one another. Only glibc offers
/// the switches; elsewhere nothing changes.
fn keep_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "a switch of the C library")]
        // SAFETY: called before any other thread exists; mallopt only sets parameters of malloc.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
            if std::env::var_os("MALLOC_ARENA_MAX").is_none()
                && let Ok(cores) = std::thread::available_parallelism()
                && let Ok(cores) = cores.get().try_into()
            {
                libc::mallopt(libc::M_ARENA_MAX, cores);
            }
        }
    }
}

/// Leaves the cores to rayon's pool alone.
///
/// candle adds and multiplies element by element on a pool of its own, whose threads spin while they wait:
/// beside rayon's, one a core, they take the time that products need. What it has left to do here is little.
fn one_pool() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        #[expect(unsafe_code, reason = "candle reads it from the environment")]
        // SAFETY: called before any other thread exists, so that nobody reads the environment meanwhile.
        unsafe {
            std::env::set_var(THREADS, "1");
        }
    }
}
