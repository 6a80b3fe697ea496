//! Process-wide settings: the allocator, and, applied before any other thread exists, those of malloc, of candle's
//! thread pool, of file descriptors and of new files' permissions.

use std::alloc::{GlobalAlloc, Layout, System};

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
/// Training frees and allocates the same large tensors every step; by default each is a fresh mapping whose page
/// faults cost as much time as the arithmetic. An arena keeps its peak size, so there should be few of them; with
/// a single one threads contend for its lock. Only glibc has these options; elsewhere this does nothing.
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

/// The program's allocator: malloc, whose larger blocks are put on huge pages where the system gives them.
///
/// Packed weights, caches and activations are read as streams of megabytes. In pages of 4 KiB each page costs a walk
/// of the page table, and ends what the processor prefetches.
struct HugePageAllocator;

#[global_allocator]
static ALLOCATOR: HugePageAllocator = HugePageAllocator;

/// Bytes from which a block is put on huge pages: matrices of a chat model, not of the playground's.
const MIN_HUGE_BLOCK: usize = 256 << 10;

#[expect(unsafe_code, reason = "an allocator is unsafe to implement")]
// SAFETY: every block is the system allocator's, with the caller's layout; advice changes no content and no address.
unsafe impl GlobalAlloc for HugePageAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's obligation.
        on_huge_pages(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's obligation.
        on_huge_pages(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligation.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's obligation.
        on_huge_pages(unsafe { System.realloc(block, layout, size) }, size)
    }
}

/// The block, after the system was asked for huge pages for it, if it is large enough. Huge pages that it only begins or ends in
/// count, since its neighbours in the heap fill them. A system without huge pages refuses, which changes nothing.
fn on_huge_pages(block: *mut u8, size: usize) -> *mut u8 {
    #[cfg(target_os = "linux")]
    if size >= MIN_HUGE_BLOCK && !block.is_null() {
        const HUGE_PAGE: usize = 2 << 20;
        let before = block.addr() % HUGE_PAGE;
        let len = (before + size).next_multiple_of(HUGE_PAGE);
        #[expect(unsafe_code, reason = "advice about memory")]
        // SAFETY: this advice changes no content; addresses that are not mapped are refused by the system.
        unsafe {
            libc::madvise(block.wrapping_sub(before).cast(), len, libc::MADV_HUGEPAGE);
        }
    }
    block
}

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

    /// Whether the system's description of the mapping that holds an address says that huge pages were asked for.
    #[cfg(target_os = "linux")]
    fn asked_for_huge_pages(address: usize) -> bool {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line
                .split_once(' ')
                .and_then(|(range, _)| range.split_once('-'));
            let ends = range.map(|(start, end)| {
                [start, end].map(|end| usize::from_str_radix(end, 16).unwrap_or(0))
            });
            if let Some([start, end]) = ends {
                inside = (start..end).contains(&address);
            }
            if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return flags.split_whitespace().any(|flag| flag == "hg");
            }
        }
        panic!("{address:x} is not mapped");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn large_blocks_ask_for_huge_pages() {
        let fresh = vec![0_u8; 3 * MIN_HUGE_BLOCK];
        let mut grown = vec![1_u8; 16];
        grown.reserve_exact(2 * MIN_HUGE_BLOCK);
        let has_huge_pages = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        for block in [&fresh, &grown] {
            let middle = block.as_ptr().addr() + MIN_HUGE_BLOCK;
            assert_eq!(asked_for_huge_pages(middle), has_huge_pages);
        }
        assert_eq!(grown, [1; 16]);
        assert!(fresh.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn the_descriptor_limit_is_raised_to_its_maximum() {
        raise_descriptor_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
