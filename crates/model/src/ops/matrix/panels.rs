//! The right factor of a product, laid out in panels.

use rayon::prelude::*;

use super::super::vector::{Arithmetic, Kernel, LANES, Line, dispatch};
use super::transpose::transpose;
use super::{Factor, filled, rows};

/// How the bytes of a panel's columns are read.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// The number that one stands for.
    pub scales: [f32; LANES],
    /// What rows that begin at 128 add to each sum: 128 times the sum of the column's bytes.
    pub excess: [i32; LANES],
}

/// A panel to be filled: the columns of the factor from `first` on, at most 16.
struct Panel<'a, W> {
    right: Factor<'a>,
    first: usize,
    lines: &'a mut [Line<W>],
}

impl<W> Panel<'_, W> {
    fn count(&self) -> usize {
        LANES.min(self.right.columns - self.first)
    }

    /// Fills the lines of a factor that lies across, 16 at a time; `words` gives those of a lane from its numbers
    /// on, of which there are `each` to a word.
    #[inline(always)]
    fn fill(self, each: usize, words: impl Fn(usize, &[f32]) -> [W; LANES])
    where
        W: Copy + Default,
    {
        let count = self.count();
        let columns = self.right.numbers.chunks(self.right.rows);
        let columns = columns.skip(self.first).take(count);
        for (place, lines) in (0..).zip(self.lines.chunks_mut(LANES)) {
            let mut square = [[W::default(); LANES]; LANES];
            for (lane, column) in columns.clone().enumerate() {
                let numbers = column.get(place * each * LANES..);
                square[lane] = words(lane, numbers.unwrap_or_default());
            }
            transpose(&mut square);
            for (line, row) in lines.iter_mut().zip(square) {
                line.0 = row;
            }
        }
    }
}

/// Makes panels of `depth` lines.
fn lay<W: Copy + Default + Send>(
    right: Factor<'_>,
    depth: usize,
    fill: impl Fn(Panel<'_, W>) + Sync,
) -> Vec<Line<W>> {
    let panels = right.columns.div_ceil(LANES);
    filled(panels, depth, 1024, |panel, lines| {
        fill(Panel {
            right,
            first: panel * LANES,
            lines,
        });
    })
}

pub(super) fn floats(right: Factor<'_>) -> Vec<Line<f32>> {
    lay(right, right.rows, |panel| dispatch(Floats(panel)))
}

pub(super) fn pairs(right: Factor<'_>, depth: usize) -> Vec<Line<u32>> {
    lay(right, depth, |panel| dispatch(Pairs(panel)))
}

/// Of a factor that lies across: weights.
pub(super) fn bytes(right: Factor<'_>, depth: usize) -> (Vec<Line<u32>>, Vec<Columns>) {
    assert!(right.across, "bytes are for weights");
    let of_panel = |columns: &[f32]| {
        let (mut scales, mut excess) = ([0.0; LANES], [0; LANES]);
        for (lane, column) in columns.chunks(right.rows).enumerate() {
            (scales[lane], excess[lane]) = dispatch(Steps(column));
        }
        Columns { scales, excess }
    };
    let panels = right.numbers.par_chunks(LANES * right.rows);
    let columns: Vec<Columns> = panels.map(of_panel).collect();
    let lines = lay(right, depth, |panel| {
        let scales = &columns[panel.first / LANES].scales;
        dispatch(Bytes { panel, scales });
    });
    (lines, columns)
}

struct Floats<'a>(Panel<'a, f32>);

impl Kernel for Floats<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (panel, count) = (&self.0, self.0.count());
        let (right, first) = (panel.right, panel.first);
        if right.across {
            self.0.fill(1, |_, numbers| rows::near(numbers));
            return;
        }
        let rows = right.numbers.chunks(right.columns);
        for (line, row) in self.0.lines.iter_mut().zip(rows) {
            line.0[..count].copy_from_slice(&row[first..first + count]);
        }
    }
}

struct Pairs<'a>(Panel<'a, u32>);

impl Kernel for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (panel, count) = (&self.0, self.0.count());
        let (right, first) = (panel.right, panel.first);
        if right.across {
            self.0.fill(2, |_, numbers| rows::pairs_of(numbers));
            return;
        }
        let zeros = [0.0; LANES];
        let two = right.numbers.chunks(2 * right.columns);
        for (line, two) in self.0.lines.iter_mut().zip(two) {
            let even = &two[first..first + count];
            // An odd row at the end stands alone.
            let odd = match two.split_at_checked(right.columns) {
                Some((_, odd)) if !odd.is_empty() => &odd[first..],
                _ => &zeros[..],
            };
            for ((word, &even), &odd) in line.0.iter_mut().zip(even).zip(odd) {
                *word = rows::pair(even, odd);
            }
        }
    }
}

struct Bytes<'a> {
    panel: Panel<'a, u32>,
    scales: &'a [f32; LANES],
}

impl Kernel for Bytes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        self.panel.fill(4, |lane, numbers| {
            rows::quads(numbers, rows::inverse(self.scales[lane]))
        });
    }
}

/// A column's scale, and 128 times the sum of its bytes.
struct Steps<'a>(&'a [f32]);

impl Kernel for Steps<'_> {
    type Output = (f32, i32);

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> (f32, i32) {
        let scale = rows::scale(self.0);
        let inverse = rows::inverse(scale);
        let mut sum = 0;
        for &x in self.0 {
            sum += i32::from(rows::byte(x, inverse));
        }
        (scale, 128 * sum)
    }
}
