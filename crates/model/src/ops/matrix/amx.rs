//! Products of bf16 in the tile registers of AMX (Intel's Advanced Matrix Extensions): 16 by 16 sums from
//! 16 rows and 16 columns of 32 numbers each in one instruction.
//!
//! The instructions are written out, since the compiler offers them to no stable program. [`Tiles::here`]
//! gives a value only where processor and kernel allow them: that is the safety argument of this file.
#![expect(
    unsafe_code,
    reason = "instructions beyond the baseline, used where they were detected"
)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
use std::sync::OnceLock;

use super::super::vector::{LANES, Level, Line, level};
use super::DEEP;
use super::tile::{Begin, Part};

/// Rows that are multiplied together: two tiles.
pub(super) const ROWS: usize = 2 * LANES;

/// A block of sums: two tiles by two.
#[repr(C, align(64))]
struct Block([[f32; 2 * LANES]; ROWS]);

/// How the tile registers are cut: palette 1, all eight of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration([u8; 64]);

impl Configuration {
    const WHOLE: Self = {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
            tile += 1;
        }
        Self(bytes)
    };
}

/// Copies as many numbers as `to` and `from` both have; two vectors at once where there are as many.
#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    let whole = (from.first_chunk::<{ 2 * LANES }>(), to.first_chunk_mut());
    if let (Some(from), Some(to)) = whole {
        *to = *from;
        return;
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// All panels of a matrix, one after the other.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub lines: &'a [Line<u32>],
    /// Lines to a panel.
    pub depth: usize,
}

/// Leave to use the tile registers.
#[derive(Clone, Copy)]
pub(super) struct Tiles(());

impl Tiles {
    /// Where the processor has tiles for bf16, the kernel lends them, and nobody asked for less.
    pub fn here() -> Option<Self> {
        static HERE: OnceLock<bool> = OnceLock::new();
        let here = *HERE.get_or_init(|| level() == Level::Avx512Dots && has_tiles() && lent());
        here.then_some(Self(()))
    }

    /// The product of the part's rows with its panels: `x` is rows of as many words as a panel has lines,
    /// their number a multiple of [`ROWS`], and the part begins at such a one.
    pub fn multiply(self, x: &[u32], panels: Panels<'_>, begin: Begin, mut part: Part<'_>) {
        let Panels { lines, depth } = panels;
        assert!(depth.is_multiple_of(DEEP) && part.rows.start.is_multiple_of(ROWS));
        let mut block = Block([[0.0; 2 * LANES]; ROWS]);
        let of_panels = part.columns.start / LANES..part.columns.end.div_ceil(LANES);
        self.begin();
        for panel in of_panels.clone().step_by(2) {
            // An odd one at the end is multiplied twice.
            let second = (panel + 1).min(of_panels.end - 1);
            let of_panel = |panel: usize| &lines[panel * depth..][..depth];
            for first in part.rows.clone().step_by(ROWS) {
                let rows = first..(first + ROWS).min(part.rows.end);
                for (row, sums) in rows.clone().zip(&mut block.0) {
                    match (begin, part.of_row(row, panel * LANES, 2 * LANES)) {
                        (Begin::Anew, _) => *sums = [0.0; 2 * LANES],
                        (Begin::There, there) => copy(there, &mut sums[..]),
                    }
                }
                let x = &x[first * depth..][..ROWS * depth];
                self.block(x, [of_panel(panel), of_panel(second)], depth, &mut block);
                for (row, sums) in rows.zip(&block.0) {
                    let out = part.of_row(row, panel * LANES, 2 * LANES);
                    copy(sums, out);
                }
            }
        }
        self.end();
    }

    /// Cuts this thread's registers.
    fn begin(self) {
        let configuration = &Configuration::WHOLE;
        // SAFETY: tiles are there and lent; the configuration is 64 bytes of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) configuration, options(nostack, readonly)) };
    }

    /// Gives this thread's registers back, so that the kernel need not keep them.
    fn end(self) {
        // SAFETY: tiles are there and lent.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// Adds the sums of 32 rows and two panels to the block.
    #[inline(always)]
    fn block(self, x: &[u32], panels: [&[Line<u32>]; 2], depth: usize, block: &mut Block) {
        assert!(x.len() == ROWS * depth && panels.iter().all(|lines| lines.len() == depth));
        let stride = 4 * depth;
        // SAFETY: tiles are there, lent and cut by `begin`. Every turn reads 16 rows of 64 bytes from each
        // of two places of `x`, `stride` bytes from row to row, and 16 lines of each panel; there are
        // `depth` / 16 turns, which the lengths asserted above allow for. The block is 32 rows of 128 bytes.
        unsafe {
            asm!(
                "tileloadd tmm0, [{out} + {row}]",
                "tileloadd tmm1, [{out} + {row} + 64]",
                "tileloadd tmm2, [{out} + {row} + 2048]",
                "tileloadd tmm3, [{out} + {row} + 2112]",
                "2:",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{second} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {turns}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "tilestored [{out} + {row} + 64], tmm1",
                "tilestored [{out} + {row} + 2048], tmm2",
                "tilestored [{out} + {row} + 2112], tmm3",
                upper = inout(reg) x.as_ptr() => _,
                lower = inout(reg) x[LANES * depth..].as_ptr() => _,
                first = inout(reg) panels[0].as_ptr() => _,
                second = inout(reg) panels[1].as_ptr() => _,
                turns = inout(reg) depth / DEEP => _,
                out = in(reg) block.0.as_mut_ptr(),
                stride = in(reg) stride,
                line = in(reg) 64usize,
                row = in(reg) 128usize,
                options(nostack),
            );
        }
    }
}

/// Whether the processor multiplies tiles of bf16.
fn has_tiles() -> bool {
    const TILES: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    if __get_cpuid_max(0).0 < 7 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    features & TILES != 0 && features & BF16 != 0
}

/// Asks the kernel to keep tile registers for this process: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
fn lent() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let answer: i64;
    // SAFETY: the system call changes what the kernel saves for this process, and no memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") REQUEST,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    answer == 0
}
