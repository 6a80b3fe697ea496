//! A heap of large blocks: one range of addresses, in which a request takes the smallest free block that holds it and a
//! freed block joins its free neighbours.

use std::{
    ptr::{self, NonNull},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Bytes before a block, which tell its size; also the largest alignment of a block.
pub(super) const HEADER: usize = 64;
/// Sizes of blocks, headers included, are multiples of this: of a page.
const GRANULE: usize = 4096;
/// Smallest rest of a block that becomes a block of its own.
const MIN_REST: usize = 64 << 10;
/// Addresses that are reserved, in bytes: the most that can be in use. Only pages that are written take memory.
const RESERVED: usize = 1 << 40;

/// A new block.
pub(super) struct LargeBlock {
    /// Its first byte.
    pub(super) address: NonNull<u8>,
    /// Whether all of it is 0.
    pub(super) is_zeroed: bool,
}

/// A block of at least `size` bytes; `None` if there are no addresses for it.
pub(super) fn allocate(size: usize) -> Option<LargeBlock> {
    let mut heap = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
    if heap.start == 0 {
        *heap = LargeHeap::new(RESERVED)?;
        START.store(heap.start, Ordering::Relaxed);
    }
    heap.allocate(size)
}

/// Frees a block that [`allocate`] returned.
pub(super) fn free(address: *mut u8) {
    let mut heap = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
    heap.free(address);
}

/// Gives up what a block that [`allocate`] returned has beyond `size` bytes. Returns whether it has as many.
pub(super) fn shrink(address: *mut u8, size: usize) -> bool {
    let mut heap = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
    heap.shrink(address, size)
}

/// Whether the address is one of the heap's.
pub(super) fn holds(address: *mut u8) -> bool {
    let start = START.load(Ordering::Relaxed);
    start != 0 && (start..start + RESERVED).contains(&address.addr())
}

static HEAP: Mutex<LargeHeap> = Mutex::new(LargeHeap {
    start: 0,
    top: 0,
    touched: 0,
    end: 0,
    last: None,
    free: None,
});
/// [`LargeHeap::start`]; 0 before the first block.
static START: AtomicUsize = AtomicUsize::new(0);

/// A block with its header, by the header.
type Block = NonNull<BlockHeader>;

/// What precedes a block.
#[repr(C, align(64))]
struct BlockHeader {
    /// Size of the block, this included.
    size: usize,
    is_free: bool,
    /// The block that ends where this begins.
    previous: Option<Block>,
    /// Neighbours in the list of free blocks.
    newer: Option<Block>,
    older: Option<Block>,
}

const _: () = assert!(size_of::<BlockHeader>() == HEADER);

/// The heap: blocks from `start` to `top`, one after another, no two free ones side by side and none at the top.
struct LargeHeap {
    start: usize,
    top: usize,
    /// Addresses from here on were never written.
    touched: usize,
    end: usize,
    /// The block before `top`.
    last: Option<Block>,
    /// The newest free block.
    free: Option<Block>,
}

#[expect(unsafe_code, reason = "the lists are made of pointers")]
// SAFETY: headers are reached from here alone.
unsafe impl Send for LargeHeap {}

#[expect(unsafe_code, reason = "the lists are made of pointers")]
impl LargeHeap {
    /// An empty heap of `reserved` bytes of addresses.
    fn new(reserved: usize) -> Option<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a mapping at an address of the system's choice changes no other; advice changes no content.
        let start = unsafe {
            let start = libc::mmap(ptr::null_mut(), reserved, access, kind, -1, 0);
            if start == libc::MAP_FAILED {
                return None;
            }
            libc::madvise(start, reserved, libc::MADV_HUGEPAGE);
            start.expose_provenance()
        };
        Some(Self {
            start,
            top: start,
            touched: start,
            end: start + reserved,
            last: None,
            free: None,
        })
    }

    fn allocate(&mut self, size: usize) -> Option<LargeBlock> {
        let size = size
            .checked_add(HEADER)?
            .checked_next_multiple_of(GRANULE)?;
        let block = match self.smallest(size) {
            Some(block) => {
                self.remove(block);
                self.cut(block, size);
                block
            }
            None => self.extend(size)?,
        };
        let first = block.addr().get() + HEADER;
        let is_zeroed = first >= self.touched;
        self.touched = self.touched.max(block.addr().get() + size);
        // SAFETY: the block begins behind its header.
        let address = unsafe { block.cast::<u8>().add(HEADER) };
        Some(LargeBlock { address, is_zeroed })
    }

    fn free(&mut self, address: *mut u8) {
        if let Some(block) = header(address) {
            self.release(block);
        }
    }

    /// Joins a block that nobody uses with its free neighbours, and lists it or lowers the top.
    fn release(&mut self, mut block: Block) {
        // SAFETY: headers of blocks are valid.
        unsafe {
            if let Some(next) = self.next(block).filter(|next| next.as_ref().is_free) {
                self.remove(next);
                self.join(block, next);
            }
            if let Some(previous) = block
                .as_ref()
                .previous
                .filter(|previous| previous.as_ref().is_free)
            {
                self.remove(previous);
                self.join(previous, block);
                block = previous;
            }
            if self.last == Some(block) {
                self.top = block.addr().get();
                self.last = block.as_ref().previous;
                return;
            }
        }
        self.insert(block);
    }

    fn shrink(&mut self, address: *mut u8, size: usize) -> bool {
        let Some(block) = header(address) else {
            return false;
        };
        let size = (size + HEADER).next_multiple_of(GRANULE);
        // SAFETY: headers of blocks are valid.
        if unsafe { block.as_ref() }.size < size {
            return false;
        }
        self.cut(block, size);
        true
    }

    /// The smallest free block of at least `size`.
    fn smallest(&self, size: usize) -> Option<Block> {
        let mut found: Option<(usize, Block)> = None;
        let mut next = self.free;
        while let Some(block) = next {
            // SAFETY: headers of blocks are valid.
            let header = unsafe { block.as_ref() };
            if header.size >= size && found.is_none_or(|(smallest, _)| header.size < smallest) {
                found = Some((header.size, block));
            }
            next = header.older;
        }
        found.map(|(_, block)| block)
    }

    /// A block of `size` at the top.
    fn extend(&mut self, size: usize) -> Option<Block> {
        let top = self.top.checked_add(size).filter(|&top| top <= self.end)?;
        let block = NonNull::new(ptr::with_exposed_provenance_mut::<BlockHeader>(self.top))?;
        // SAFETY: addresses from the top to the end are the heap's and no block's.
        unsafe {
            block.write(BlockHeader {
                size,
                is_free: false,
                previous: self.last,
                newer: None,
                older: None,
            });
        }
        (self.top, self.last) = (top, Some(block));
        Some(block)
    }

    /// Makes a block as small as `size`, if the rest of it is large enough to be a block, which is free then.
    fn cut(&mut self, mut block: Block, size: usize) {
        // SAFETY: the rest begins within the block, which has a valid header.
        let rest = unsafe {
            let rest_size = block.as_ref().size - size;
            if rest_size < MIN_REST {
                return;
            }
            let rest = block.byte_add(size);
            rest.write(BlockHeader {
                size: rest_size,
                is_free: false,
                previous: Some(block),
                newer: None,
                older: None,
            });
            match self.next(block) {
                Some(mut next) => next.as_mut().previous = Some(rest),
                None => self.last = Some(rest),
            }
            block.as_mut().size = size;
            rest
        };
        self.release(rest);
    }

    /// Makes one block of two side by side, of which neither is in the list.
    fn join(&mut self, mut block: Block, next: Block) {
        // SAFETY: headers of blocks are valid.
        unsafe {
            match self.next(next) {
                Some(mut after) => after.as_mut().previous = Some(block),
                None => self.last = Some(block),
            }
            block.as_mut().size += next.as_ref().size;
        }
    }

    /// The block that begins where this ends.
    fn next(&self, block: Block) -> Option<Block> {
        // SAFETY: headers of blocks are valid, and blocks follow one another up to the top.
        let next = unsafe { block.byte_add(block.as_ref().size) };
        (next.addr().get() < self.top).then_some(next)
    }

    /// Adds a block to the list of free ones.
    fn insert(&mut self, mut block: Block) {
        // SAFETY: headers of blocks are valid.
        unsafe {
            let header = block.as_mut();
            header.is_free = true;
            (header.newer, header.older) = (None, self.free);
            if let Some(mut newest) = self.free {
                newest.as_mut().newer = Some(block);
            }
        }
        self.free = Some(block);
    }

    /// Takes a block out of the list of free ones.
    fn remove(&mut self, mut block: Block) {
        // SAFETY: headers of blocks are valid.
        unsafe {
            let header = block.as_mut();
            header.is_free = false;
            match header.newer {
                Some(mut newer) => newer.as_mut().older = header.older,
                None => self.free = header.older,
            }
            if let Some(mut older) = header.older {
                older.as_mut().newer = header.newer;
            }
        }
    }
}

/// The block whose bytes begin at an address that [`allocate`] returned.
fn header(address: *mut u8) -> Option<Block> {
    NonNull::new(address.wrapping_sub(HEADER).cast())
}

#[cfg(test)]
#[expect(unsafe_code, reason = "the blocks are written")]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn heap(reserved: usize) -> LargeHeap {
        LargeHeap::new(reserved).expect("addresses")
    }

    fn address(heap: &mut LargeHeap, size: usize) -> *mut u8 {
        heap.allocate(size).expect("a block").address.as_ptr()
    }

    #[test]
    fn a_request_takes_the_smallest_block_that_holds_it() {
        let mut heap = heap(64 * MIB);
        let sizes = [6, 1, 3, 1, 9, 1].map(|mib| mib * MIB);
        let all = sizes.map(|size| address(&mut heap, size));
        for index in [0, 2, 4] {
            heap.free(all[index]);
        }
        let top = heap.top;
        assert_eq!(address(&mut heap, 2 * MIB), all[2], "of 6, 3 and 9");
        assert_eq!(address(&mut heap, 5 * MIB), all[0]);
        let rest = address(&mut heap, MIB / 2);
        assert!(
            rest > all[0] && rest < all[4],
            "what is left of a block is a block"
        );
        assert_eq!(heap.top, top, "nothing was added");
        assert!(
            address(&mut heap, 10 * MIB) > all[5],
            "nothing free holds it"
        );
    }

    #[test]
    fn free_blocks_side_by_side_are_one() {
        let mut heap = heap(64 * MIB);
        let all = [2, 3, 4, 1].map(|mib| address(&mut heap, mib * MIB));
        for index in [0, 2, 1] {
            heap.free(all[index]);
        }
        assert_eq!(address(&mut heap, 9 * MIB), all[0], "of three");
        heap.free(all[0]);
        heap.free(all[3]);
        assert_eq!((heap.top, heap.last, heap.free), (heap.start, None, None));
    }

    #[test]
    fn a_block_shrinks_in_place() {
        let mut heap = heap(16 * MIB);
        let [first, second] = [8, 2].map(|mib| address(&mut heap, mib * MIB));
        assert!(!heap.shrink(first, 9 * MIB), "it has not as much");
        assert!(heap.shrink(first, 3 * MIB));
        let between = address(&mut heap, 4 * MIB);
        assert!(first < between && between < second);
        assert!(heap.shrink(second, MIB));
        assert_eq!(
            heap.top,
            second.addr() + MIB + GRANULE - HEADER,
            "the rest is above the top again"
        );
    }

    #[test]
    fn addresses_end() {
        let mut heap = heap(4 * MIB);
        let first = address(&mut heap, 3 * MIB);
        assert!(heap.allocate(MIB).is_none());
        assert!(heap.allocate(usize::MAX - 1).is_none());
        heap.free(first);
        assert!(heap.allocate(3 * MIB).is_some());
    }

    #[test]
    fn only_what_was_never_used_is_zeroed() {
        let mut heap = heap(16 * MIB);
        let first = heap.allocate(2 * MIB).expect("a block");
        assert!(first.is_zeroed);
        heap.free(first.address.as_ptr());
        for (size, is_zeroed) in [(MIB, false), (4 * MIB, false), (MIB, true)] {
            let block = heap.allocate(size).expect("a block");
            assert_eq!(block.is_zeroed, is_zeroed, "{size}");
        }
    }

    /// Blocks of random sizes, freed and shrunk in random order: none has another's bytes, and in the end all is free.
    #[test]
    fn blocks_do_not_overlap() {
        let mut heap = heap(512 * MIB);
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        let mut used: Vec<(*mut u8, usize, u8)> = Vec::new();
        let fill = |&(block, size, mark): &(*mut u8, usize, u8)| {
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(mark, size) };
        };
        let check = |&(block, size, mark): &(*mut u8, usize, u8)| {
            // SAFETY: the block has this size.
            let bytes = unsafe { std::slice::from_raw_parts(block, size) };
            assert!(
                bytes
                    .iter()
                    .step_by(997)
                    .chain(bytes.last())
                    .all(|&byte| byte == mark)
            );
        };
        for round in 0..2000_u64 {
            if used.len() < 24 && random(3) > 0 {
                let size = 1 + random(3 * MIB as u64) as usize;
                used.push((address(&mut heap, size), size, round as u8));
                used.last().into_iter().for_each(fill);
            } else if let Some(index) = (random(64) as usize).checked_rem(used.len()) {
                check(&used[index]);
                let size = 1 + used[index].1 / 2;
                match random(3) {
                    0 => {
                        assert!(heap.shrink(used[index].0, size));
                        used[index].1 = size;
                    }
                    _ => heap.free(used.swap_remove(index).0),
                }
            }
        }
        used.iter().for_each(check);
        for (block, ..) in used {
            heap.free(block);
        }
        assert_eq!((heap.top, heap.last, heap.free), (heap.start, None, None));
    }
}
