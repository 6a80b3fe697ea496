//! The program's allocator on Linux: malloc, and a heap of its own for large blocks.
//!
//! Training frees and allocates the same large tensors every step. Where each is a mapping of its own its page faults cost
//! as much as the arithmetic, and where threads have heaps of their own each keeps what is in use at its own peak. Large
//! blocks of all threads come from one heap, which grows to what is in use at a time, and keeps its pages. Promises that a
//! block is its caller's alone, and that a new one of zeroed memory is zeros. Larger blocks are put on huge pages where the
//! system gives them: packed weights, caches and activations are read as streams of megabytes, and in pages of 4 KiB each
//! page costs a walk of the page table and ends what the processor prefetches.

mod heap;

use std::alloc::{GlobalAlloc, Layout, System};

/// The program's allocator.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Bytes from which a block is of the heap.
const MIN_LARGE: usize = 1 << 20;
/// Bytes from which a block of malloc is put on huge pages: matrices of a chat model, not of the playground's.
const MIN_HUGE_BLOCK: usize = 256 << 10;

/// Whether a block of this layout is taken from the heap, if that has addresses left.
fn is_large(layout: Layout) -> bool {
    layout.size() >= MIN_LARGE && layout.align() <= heap::HEADER
}

/// Whether a block of this layout is the heap's.
fn is_of_heap(block: *mut u8, layout: Layout) -> bool {
    is_large(layout) && heap::holds(block)
}

#[expect(unsafe_code, reason = "an allocator is unsafe to implement")]
// SAFETY: a block is the system allocator's or the heap's, which of both its address says; both are valid for the layout
// and nobody else's until they are freed.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout)
            && let Some(block) = heap::allocate(layout.size())
        {
            return block.address.as_ptr();
        }
        // SAFETY: the caller's obligation.
        on_huge_pages(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout)
            && let Some(block) = heap::allocate(layout.size())
        {
            if !block.is_zeroed {
                // SAFETY: the block has at least the layout's size.
                unsafe { block.address.write_bytes(0, layout.size()) };
            }
            return block.address.as_ptr();
        }
        // SAFETY: the caller's obligation.
        on_huge_pages(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match is_of_heap(block, layout) {
            true => heap::free(block),
            // SAFETY: the caller's obligation.
            false => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's obligation: `size` is not 0, and it fits when it is rounded up to the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        let is_of_heap = is_of_heap(block, layout);
        if !is_of_heap && !is_large(new) {
            // SAFETY: the caller's obligation.
            return on_huge_pages(unsafe { System.realloc(block, layout, size) }, size);
        }
        if is_of_heap && is_large(new) && heap::shrink(block, size) {
            return block;
        }
        // SAFETY: the caller's obligation; two blocks in use do not overlap.
        unsafe {
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}

/// The block, after the system was asked for huge pages for it, if it is large enough. Huge pages that it only begins or ends in
/// count, since its neighbours fill them. A system without huge pages refuses, which changes nothing.
fn on_huge_pages(block: *mut u8, size: usize) -> *mut u8 {
    const HUGE_PAGE: usize = 2 << 20;
    if size >= MIN_HUGE_BLOCK && !block.is_null() {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the system's description of the mapping that holds an address says that huge pages were asked for.
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
    fn large_blocks_ask_for_huge_pages() {
        let fresh = vec![0_u8; 3 * MIN_HUGE_BLOCK];
        let mut grown = vec![1_u8; 16];
        grown.reserve_exact(2 * MIN_HUGE_BLOCK);
        let large = vec![0_u8; 3 * MIN_LARGE];
        let has_huge_pages = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        for block in [&fresh, &grown, &large] {
            let middle = block.as_ptr().addr() + MIN_HUGE_BLOCK;
            assert_eq!(asked_for_huge_pages(middle), has_huge_pages);
        }
        assert_eq!(grown, [1; 16]);
        assert!(fresh.iter().chain(&large).all(|&byte| byte == 0));
    }

    /// Threads that allocate, grow, shrink and free blocks on both sides of the boundary find in each what they wrote.
    #[test]
    fn blocks_keep_their_content() {
        let sizes = [
            MIN_LARGE / 2,
            MIN_LARGE,
            MIN_LARGE + 1,
            3 * MIN_LARGE,
            5 * MIN_LARGE / 2,
        ];
        let work = |thread: u8| {
            let mut kept: Vec<Vec<u8>> = Vec::new();
            for round in 0..60_usize {
                let size = sizes[(round * 7 + usize::from(thread)) % sizes.len()];
                let zeros = vec![0_u8; size];
                assert!(
                    zeros.iter().all(|&byte| byte == 0),
                    "zeroed memory is zeros"
                );
                let mut block = vec![thread; size];
                block.resize(size + round * 40_000, thread);
                block.shrink_to(size);
                kept.push(block);
                if kept.len() > 3 {
                    let block = kept.swap_remove(round % 3);
                    assert!(block.iter().all(|&byte| byte == thread));
                }
            }
        };
        std::thread::scope(|scope| {
            for thread in 1..=4 {
                scope.spawn(move || work(thread));
            }
        });
    }
}
