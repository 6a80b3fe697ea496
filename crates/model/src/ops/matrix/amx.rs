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
use std::ops::Range;
use std::sync::OnceLock;

use super::super::vector::{LANES, Level, Line, level};
use super::tile::{Begin, Part};
use super::{BLOCK, DEEP};

/// Panels that are multiplied together: two tiles.
pub(super) const GROUP: usize = 2;

/// Columns of a block.
const WIDE: usize = GROUP * LANES;

/// Lines of a panel that are taken together, so that they stay near while all rows meet them.
const LINES: usize = 256;

/// A block of sums, two tiles by two, where the result has none as large.
#[repr(C, align(64))]
struct Block([[f32; WIDE]; BLOCK]);

/// Where a block of sums lies: its first number, and numbers from row to row.
#[derive(Clone, Copy)]
struct Sums(*mut f32, usize);

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

    /// The product of the part's rows with its panels: `x` is rows of as many words as a panel has lines, in
    /// tiles, their number a multiple of [`BLOCK`], and the part begins at such a one.
    pub fn multiply(self, x: &[u32], panels: Panels<'_>, begin: Begin, mut part: Part<'_>) {
        let depth = panels.depth;
        assert!(depth.is_multiple_of(DEEP) && part.rows.start.is_multiple_of(BLOCK));
        let pieces = depth.div_ceil(LINES).max(1);
        let piece = depth.div_ceil(pieces).next_multiple_of(DEEP);
        self.begin();
        for first in (0..depth).step_by(piece) {
            let lines = first..(first + piece).min(depth);
            let begin = if first > 0 { Begin::There } else { begin };
            self.lines(x, (panels, &lines), begin, &mut part);
        }
        self.end();
    }

    /// The same with some lines.
    fn lines(
        self,
        x: &[u32],
        (panels, lines): (Panels<'_>, &Range<usize>),
        begin: Begin,
        part: &mut Part<'_>,
    ) {
        let depth = panels.depth;
        let mut block = Block([[0.0; WIDE]; BLOCK]);
        let of_panels = part.columns.start / LANES..part.columns.end.div_ceil(LANES);
        let of_panel = |panel: usize| &panels.lines[panel * depth..][lines.clone()];
        for panel in of_panels.clone().step_by(GROUP) {
            // An odd one at the end is multiplied twice.
            let second = (panel + 1).min(of_panels.end - 1);
            let right = [of_panel(panel), of_panel(second)];
            for first in part.rows.clone().step_by(BLOCK) {
                let of_rows = |first: usize| &x[first * depth..][lines.start * LANES..];
                let left = [of_rows(first), of_rows(first + LANES)];
                if let Some((sums, stride)) = part.block((first, BLOCK), (panel * LANES, WIDE)) {
                    self.block(left, right, begin, Sums(sums, stride));
                    continue;
                }
                let rows = first..(first + BLOCK).min(part.rows.end);
                if begin == Begin::There {
                    for (row, sums) in rows.clone().zip(&mut block.0) {
                        part.get(row, panel * LANES, sums);
                    }
                }
                self.block(
                    left,
                    right,
                    begin,
                    Sums(block.0.as_flattened_mut().as_mut_ptr(), WIDE),
                );
                for (row, sums) in rows.zip(&block.0) {
                    part.put(row, panel * LANES, sums);
                }
            }
        }
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

    /// The sums of twice 16 rows and two panels. The block is 32 rows of 32 numbers that nobody else reaches
    /// meanwhile.
    #[inline(always)]
    fn block(self, left: [&[u32]; 2], panels: [&[Line<u32>]; 2], begin: Begin, sums: Sums) {
        let depth = panels[0].len();
        assert!(depth.is_multiple_of(DEEP) && depth > 0 && panels[1].len() == depth);
        assert!(left.iter().all(|words| words.len() >= LANES * depth));
        // SAFETY: tiles are there, lent and cut by `begin`. Every turn reads 16 rows of 64 bytes that follow
        // one another from each of two places on the left, and 16 lines of each panel; there are `depth` / 16
        // turns, which the lengths asserted above allow for. The block is there, as the caller says.
        unsafe {
            asm!(
                "test {anew:e}, {anew:e}",
                "jnz 3f",
                "tileloadd tmm0, [{out} + {row}]",
                "tileloadd tmm1, [{out} + {row} + 64]",
                "tileloadd tmm2, [{below} + {row}]",
                "tileloadd tmm3, [{below} + {row} + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{upper} + {line}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{second} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {line}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 1024",
                "add {lower}, 1024",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {turns}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "tilestored [{out} + {row} + 64], tmm1",
                "tilestored [{below} + {row}], tmm2",
                "tilestored [{below} + {row} + 64], tmm3",
                anew = in(reg) u32::from(begin == Begin::Anew),
                upper = inout(reg) left[0].as_ptr() => _,
                lower = inout(reg) left[1].as_ptr() => _,
                first = inout(reg) panels[0].as_ptr() => _,
                second = inout(reg) panels[1].as_ptr() => _,
                turns = inout(reg) depth / DEEP => _,
                out = in(reg) sums.0,
                below = in(reg) sums.0.add(LANES * sums.1),
                line = in(reg) 64usize,
                row = in(reg) 4 * sums.1,
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
