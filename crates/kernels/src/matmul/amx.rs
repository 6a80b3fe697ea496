//! bf16 products in AMX tile registers (Intel's Advanced Matrix Extensions). One `tdpbf16ps` adds the product of
//! 16 rows and 16 columns, 32 values of the inner dimension, to 16 × 16 accumulators.
//!
//! Written as inline assembly, because the intrinsics are unstable. [`Amx::detect`] returns a value only if the
//! processor has the instructions and the operating system permits them: that is the safety argument of this file.
#![expect(
    unsafe_code,
    reason = "instructions beyond the baseline, used only if detected"
)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
use std::ops::Range;
use std::sync::OnceLock;

use super::tile::{Accumulate, Tile};
use super::{BF16_DEPTH_MULTIPLE, Granularity, ROW_MULTIPLE};
use crate::simd::{CacheLine, LANES, Level, level};

/// Panels per micro-kernel: two tile registers.
const PANELS: usize = 2;

/// Columns of an output block.
const COLUMNS: usize = PANELS * LANES;

/// Output tiles begin at multiples of this.
pub(super) const GRANULARITY: Granularity = Granularity {
    rows: ROW_MULTIPLE,
    panels: PANELS,
};

/// Maximum k-block: cache lines of a panel that stay in cache while all rows of the tile are multiplied.
const K_BLOCK: usize = 256;

/// An output block, two tile registers by two, for the edges of the output.
#[repr(C, align(64))]
struct EdgeBlock([[f32; COLUMNS]; ROW_MULTIPLE]);

/// Address of an output block, and the stride of its rows in values.
#[derive(Clone, Copy)]
struct BlockAddress {
    first: *mut f32,
    stride: usize,
}

/// Operand of `ldtilecfg`: palette 1, eight tile registers of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

impl TileConfig {
    const FULL: Self = {
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

/// Packed operands of a product.
#[derive(Clone, Copy)]
pub(super) struct AmxOperands<'a> {
    /// Rows of `depth` words in the layout [`AmxTiles`](super::rows::RowLayout::AmxTiles), their number a multiple of
    /// [`ROW_MULTIPLE`].
    pub left: &'a [u32],
    /// Panel after panel, `depth` cache lines each.
    pub panels: &'a [CacheLine<u32>],
    pub depth: usize,
}

/// Proof that the tile registers may be used.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// `Some` if the processor has bf16 tiles, the operating system permits them and `AGON_VECTORS` does not lower the
    /// level.
    pub fn detect() -> Option<Self> {
        static DETECTED: OnceLock<bool> = OnceLock::new();
        let detected = *DETECTED
            .get_or_init(|| level() == Level::Avx512Dots && has_tiles() && request_permission());
        detected.then_some(Self(()))
    }

    /// The product of the tile's rows with its panels; the tile begins at a multiple of [`ROW_MULTIPLE`].
    pub fn multiply(self, operands: AmxOperands<'_>, accumulate: Accumulate, mut tile: Tile<'_>) {
        let depth = operands.depth;
        assert!(
            depth.is_multiple_of(BF16_DEPTH_MULTIPLE)
                && tile.rows.start.is_multiple_of(ROW_MULTIPLE)
        );
        let blocks = depth.div_ceil(K_BLOCK).max(1);
        let k_block = depth.div_ceil(blocks).next_multiple_of(BF16_DEPTH_MULTIPLE);
        self.configure();
        for first in (0..depth).step_by(k_block) {
            let k_range = first..(first + k_block).min(depth);
            let accumulate = if first > 0 {
                Accumulate::Add
            } else {
                accumulate
            };
            self.k_block(operands, &k_range, accumulate, &mut tile);
        }
        self.release();
    }

    /// The same over one k-block.
    fn k_block(
        self,
        operands: AmxOperands<'_>,
        k_range: &Range<usize>,
        accumulate: Accumulate,
        tile: &mut Tile<'_>,
    ) {
        let AmxOperands {
            left: x,
            panels: lines,
            depth,
        } = operands;
        let mut edge = EdgeBlock([[0.0; COLUMNS]; ROW_MULTIPLE]);
        let panels = tile.columns.start / LANES..tile.columns.end.div_ceil(LANES);
        let panel_at = |panel: usize| &lines[panel * depth..][k_range.clone()];
        for panel in panels.clone().step_by(PANELS) {
            // An odd one at the end is multiplied twice.
            let second = (panel + 1).min(panels.end - 1);
            let right = [panel_at(panel), panel_at(second)];
            for first in tile.rows.clone().step_by(ROW_MULTIPLE) {
                let rows_at = |first: usize| &x[first * depth..][k_range.start * LANES..];
                let left = [rows_at(first), rows_at(first + LANES)];
                let columns = panel * LANES..panel * LANES + COLUMNS;
                if let Some((first, stride)) = tile.block(first..first + ROW_MULTIPLE, columns) {
                    self.micro_kernel(left, right, accumulate, BlockAddress { first, stride });
                    continue;
                }
                let rows = first..(first + ROW_MULTIPLE).min(tile.rows.end);
                if accumulate == Accumulate::Add {
                    for (row, values) in rows.clone().zip(&mut edge.0) {
                        tile.read(row, panel * LANES, values);
                    }
                }
                let output = BlockAddress {
                    first: edge.0.as_flattened_mut().as_mut_ptr(),
                    stride: COLUMNS,
                };
                self.micro_kernel(left, right, accumulate, output);
                for (row, values) in rows.zip(&edge.0) {
                    tile.write(row, panel * LANES, values);
                }
            }
        }
    }

    /// Configures this thread's tile registers.
    fn configure(self) {
        let config = &TileConfig::FULL;
        // SAFETY: AMX is available; the configuration is 64 bytes of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config, options(nostack, readonly)) };
    }

    /// Releases this thread's tile registers, so that the operating system need not save them.
    fn release(self) {
        // SAFETY: AMX is available.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// Two times 16 rows by two panels: `tmm0..=tmm3` are the accumulators, `tmm4`, `tmm5` the rows, `tmm6`, `tmm7` the
    /// panels. The output block is 32 rows of 32 values to which the caller has exclusive access.
    #[inline(always)]
    fn micro_kernel(
        self,
        left: [&[u32]; 2],
        panels: [&[CacheLine<u32>]; 2],
        accumulate: Accumulate,
        output: BlockAddress,
    ) {
        let depth = panels[0].len();
        assert!(depth.is_multiple_of(BF16_DEPTH_MULTIPLE) && depth > 0 && panels[1].len() == depth);
        assert!(left.iter().all(|words| words.len() >= LANES * depth));
        // SAFETY: AMX is available and configured by `configure`. Every step reads 16 consecutive rows of 64 bytes
        // from each of the two left slices, and 16 cache lines of each panel; there are `depth` / 16 steps, for
        // which the lengths asserted above suffice. The output block is valid, as the caller promises.
        unsafe {
            asm!(
                "test {overwrite:e}, {overwrite:e}",
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
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "tilestored [{out} + {row} + 64], tmm1",
                "tilestored [{below} + {row}], tmm2",
                "tilestored [{below} + {row} + 64], tmm3",
                overwrite = in(reg) u32::from(accumulate == Accumulate::Overwrite),
                upper = inout(reg) left[0].as_ptr() => _,
                lower = inout(reg) left[1].as_ptr() => _,
                first = inout(reg) panels[0].as_ptr() => _,
                second = inout(reg) panels[1].as_ptr() => _,
                steps = inout(reg) depth / BF16_DEPTH_MULTIPLE => _,
                out = in(reg) output.first,
                below = in(reg) output.first.add(LANES * output.stride),
                line = in(reg) 64usize,
                row = in(reg) 4 * output.stride,
                options(nostack),
            );
        }
    }
}

/// Whether the processor has AMX-TILE and AMX-BF16.
fn has_tiles() -> bool {
    const TILES: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    if __get_cpuid_max(0).0 < 7 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    features & TILES != 0 && features & BF16 != 0
}

/// Requests permission to use tile registers: `arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)`.
fn request_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let status: i64;
    // SAFETY: the system call changes the state that Linux saves for this process, and no memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") REQUEST,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    status == 0
}
