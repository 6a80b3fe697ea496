//! The allocator's habits, set once at the start.

/// Keeps freed pages instead of returning them to the system.
///
/// Training frees and allocates the same large tensors every step; by default each is a fresh mapping
/// whose pages fault in one by one, which costs as much time as the arithmetic. Only glibc offers the
/// switch; elsewhere nothing changes.
pub(crate) fn keep_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "a switch of the C library")]
        // SAFETY: called before any other thread exists; mallopt only sets parameters of malloc.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        }
    }
}
