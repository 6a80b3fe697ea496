//! Formatting and parsing of numbers as in Python.

use std::cmp::Ordering;

/// Python's `repr` of a float: the shortest digits that round-trip.
pub(crate) fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let written = format!("{number:e}");
    let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{number}");
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Ordering of an integer and a float; `None` for NaN.
pub(crate) fn compare_int(int: i128, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    // No `i128` is beyond these bounds.
    if float >= 2f64.powi(127) {
        return Some(Ordering::Less);
    }
    if float < -(2f64.powi(127)) {
        return Some(Ordering::Greater);
    }
    let whole = float.trunc();
    // The conversion is exact within the bounds.
    let by_whole = int.cmp(&(whole as i128));
    Some(by_whole.then_with(|| 0.0.partial_cmp(&(float - whole)).unwrap_or(Ordering::Equal)))
}

/// Python's `int` of a string in this base; 0 takes the base from the prefix.
pub(crate) fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(crate::text::is_space);
    let (is_negative, digits) = match text.strip_prefix(['-', '+']) {
        Some(digits) => (text.starts_with('-'), digits),
        None => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)]
        .into_iter()
        .find_map(|(prefix, radix)| {
            let rest = lower
                .strip_prefix(prefix)
                .filter(|_| base == radix || base == 0)?;
            Some((rest.strip_prefix('_').unwrap_or(rest).to_owned(), radix))
        });
    let (digits, radix) = prefixed.unwrap_or((lower, if base == 0 { 10 } else { base }));
    if digits.starts_with(['-', '+']) {
        return None;
    }
    if base == 0
        && radix == 10
        && digits.starts_with('0')
        && !digits.trim_matches(['0', '_']).is_empty()
    {
        return None;
    }
    let number = i128::from_str_radix(&without_underscores(&digits)?, radix).ok()?;
    Some(if is_negative { -number } else { number })
}

/// Python's `float` of a string.
pub(crate) fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(crate::text::is_space);
    without_underscores(text)?.parse().ok()
}

/// Removes underscores, each of which must be between two digits.
fn without_underscores(text: &str) -> Option<String> {
    if text.is_empty() || text.starts_with(['-', '+', '_']) && text.len() == 1 {
        return None;
    }
    let chars: Vec<char> = text.chars().collect();
    let stands_well = |position: usize| {
        let is_digit =
            |position: usize| chars.get(position).is_some_and(char::is_ascii_alphanumeric);
        position > 0 && is_digit(position - 1) && is_digit(position + 1)
    };
    let mut positions = chars.iter().enumerate().filter(|(_, c)| **c == '_');
    positions
        .all(|(position, _)| stands_well(position))
        .then(|| text.replace('_', ""))
}

/// Python's `round` of a float to `digits` decimals: the decimal nearest to the exact value, ties to even.
pub(crate) fn round_float(number: f64, digits: i32) -> f64 {
    if !number.is_finite() {
        return number;
    }
    match usize::try_from(digits) {
        // More decimals than any float has.
        Ok(digits) if digits > 330 => number,
        Ok(digits) => format!("{number:.digits$}").parse().unwrap_or(number),
        Err(_) => {
            let unit = 10f64.powi(digits.saturating_neg());
            match unit.is_finite() {
                true => (number / unit).round_ties_even() * unit,
                false => 0f64.copysign(number),
            }
        }
    }
}

/// Python's `round` of an integer to a negative number of digits: to tens, to hundreds; `None` beyond 128 bits.
pub(crate) fn round_int(number: i128, digits: i32) -> Option<i128> {
    if digits >= 0 {
        return Some(number);
    }
    let Some(unit) = 10i128.checked_pow(digits.unsigned_abs()) else {
        // Half of 10^39 is more than any number here has.
        return Some(0);
    };
    let (below, rest) = (number.div_euclid(unit), number.rem_euclid(unit));
    let up = match rest.cmp(&(unit - rest)) {
        Ordering::Less => 0,
        Ordering::Greater => 1,
        Ordering::Equal => below.rem_euclid(2),
    };
    (below + up).checked_mul(unit)
}
