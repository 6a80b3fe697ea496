//! Whether a regular expression is matched in time linear in the text.
//!
//! fancy-regex hands what has no look-around or reference to a linear engine and backtracks over the rest. Here the
//! backtracking part may have at most one repetition of unknown length, as `\s+(?!\S)` of GPT-2 has. Other expressions may
//! be linear too; this is not known.

use fancy_regex::Expr;

/// Largest number of ways to match a sequence, apart from one repetition of unknown length.
const MAX_WAYS: usize = 64;

/// Whether the expression is known to be matched in linear time. `false` also for what is not an expression.
pub(super) fn is_linear(pattern: &str) -> bool {
    Expr::parse_tree(pattern).is_ok_and(|tree| is_linear_expr(&tree.expr))
}

fn is_linear_expr(expr: &Expr) -> bool {
    if is_easy(expr) {
        return true;
    }
    match expr {
        Expr::Alt(branches) => branches.iter().all(is_linear_expr),
        Expr::Group(child) | Expr::AtomicGroup(child) => is_linear_expr(child),
        Expr::LookAround(child, _) => is_easy(child) && ways(child).is_some(),
        Expr::Concat(parts) => {
            let (bounded, unbounded): (Vec<_>, Vec<_>) = parts
                .iter()
                .map(|part| (part, ways(part)))
                .partition(|(_, ways)| ways.is_some());
            let total = bounded
                .iter()
                .filter_map(|(_, ways)| *ways)
                .fold(1, usize::saturating_mul);
            let is_flat = match unbounded.as_slice() {
                [] => true,
                [(part, _)] => repeats_a_character(part),
                _ => false,
            };
            is_flat && total <= MAX_WAYS && parts.iter().all(is_linear_expr)
        }
        _ => false,
    }
}

/// Whether the linear engine matches the expression alone.
fn is_easy(expr: &Expr) -> bool {
    match expr {
        Expr::Empty
        | Expr::Any { .. }
        | Expr::Literal { .. }
        | Expr::Delegate { .. }
        | Expr::Assertion(_) => true,
        Expr::Concat(parts) | Expr::Alt(parts) => parts.iter().all(is_easy),
        Expr::Group(child) | Expr::Repeat { child, .. } => is_easy(child),
        _ => false,
    }
}

/// Whether an expression repeats one character, of a class or any.
fn repeats_a_character(expr: &Expr) -> bool {
    match expr {
        Expr::Repeat { child, .. } => matches!(
            **child,
            Expr::Any { .. } | Expr::Literal { .. } | Expr::Delegate { .. }
        ),
        Expr::Group(child) => repeats_a_character(child),
        _ => false,
    }
}

/// Number of ways to match the expression that are tried one after another; `None` if it depends on the text. What an
/// atomic group or a look-around matched is not tried again.
fn ways(expr: &Expr) -> Option<usize> {
    let count = match expr {
        Expr::Empty
        | Expr::Any { .. }
        | Expr::Literal { .. }
        | Expr::Delegate { .. }
        | Expr::Assertion(_)
        | Expr::LookAround(..)
        | Expr::AtomicGroup(_) => 1,
        Expr::Concat(parts) => parts.iter().try_fold(1, |product: usize, part| {
            Some(product.saturating_mul(ways(part)?))
        })?,
        Expr::Alt(parts) => parts
            .iter()
            .try_fold(0, |sum: usize, part| Some(sum.saturating_add(ways(part)?)))?,
        Expr::Group(child) => ways(child)?,
        Expr::Repeat { child, lo, hi, .. } => {
            let each = ways(child)?.saturating_pow(u32::try_from(*hi).ok()?);
            each.saturating_mul(hi.checked_sub(*lo)?.checked_add(1)?)
        }
        _ => return None,
    };
    (count <= MAX_WAYS).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_published_tokenizers_are_linear() {
        for pattern in [
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t)?|\p{N}{1,3}|\s+(?!\S)|\s+",
            r" {2,}",
            r"[0-9][0-9][0-9]",
            r"\p{N}",
            r"(?<=x)\d",
            r"(a+)+b",
        ] {
            assert!(is_linear(pattern), "{pattern}");
        }
    }

    #[test]
    fn what_backtracks_without_bound_is_not_linear() {
        for pattern in [
            r"(a+)+(?!b)",
            r"(?:a|a)*(?=b)",
            r"a*a*(?!b)",
            r"(a|a){8}(a|a){8}(?!b)",
            r"(ab)*(?!b)",
            r"(a+)\1",
            r"(?=.*b)a",
            r"(?:a(?=b))*",
            r"(?>a*)(?:b+)+(?!c)",
            r"(",
        ] {
            assert!(!is_linear(pattern), "{pattern}");
        }
    }
}
