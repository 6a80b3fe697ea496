//! Length-controlled win rate: the win rate at equal lengths of both completions.

/// Steps of Newton's method, far more than two variables need.
const ITERATIONS: usize = 50;
/// Ridge penalty, which keeps the fit finite if length alone decides every pair.
const RIDGE: f64 = 1e-2;

/// Length-controlled win rate: the value at d = 0 of a logistic regression of `wins` (1, 0, or ½ for a tie) on
/// tanh(d/σ), with d the policy's length minus the reference's and σ its standard deviation. This is the length term of
/// Dubois et al. 2024 (Length-Controlled AlpacaEval, equation 2), without the terms for several models and single
/// prompts. Both lists have the same length.
pub(crate) fn win_rate(wins: &[f64], differences: &[f64]) -> f64 {
    let n = wins.len().max(1) as f64;
    let mean = differences.iter().sum::<f64>() / n;
    let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n;
    let deviation = variance.sqrt().max(1e-9);
    let rows: Vec<(f64, f64)> = wins
        .iter()
        .zip(differences)
        .map(|(&win, d)| (win, (d / deviation).tanh()))
        .collect();
    let (mut intercept, mut slope) = (0.0, 0.0);
    for _ in 0..ITERATIONS {
        let (d_intercept, d_slope) = newton_step(&rows, intercept, slope);
        intercept += d_intercept;
        slope += d_slope;
    }
    sigmoid(intercept)
}

/// One step of Newton's method on the regularised log-likelihood.
fn newton_step(rows: &[(f64, f64)], intercept: f64, slope: f64) -> (f64, f64) {
    let mut gradient = (-RIDGE * intercept, -RIDGE * slope);
    let mut hessian = (RIDGE, 0.0, RIDGE);
    for &(win, x) in rows {
        let p = sigmoid(intercept + slope * x);
        let weight = p * (1.0 - p);
        gradient.0 += win - p;
        gradient.1 += (win - p) * x;
        hessian.0 += weight;
        hessian.1 += weight * x;
        hessian.2 += weight * x * x;
    }
    let determinant = hessian.0 * hessian.2 - hessian.1 * hessian.1;
    (
        (hessian.2 * gradient.0 - hessian.1 * gradient.1) / determinant,
        (hessian.0 * gradient.1 - hessian.1 * gradient.0) / determinant,
    )
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repeated(pattern: &[(f64, f64)]) -> (Vec<f64>, Vec<f64>) {
        (0..100).flat_map(|_| pattern.iter().copied()).unzip()
    }

    #[test]
    fn equal_lengths_leave_the_win_rate_unchanged() {
        let (wins, differences) = repeated(&[(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 0.0)]);
        let rate = win_rate(&wins, &differences);
        assert!((rate - 0.75).abs() < 1e-3, "{rate}");
    }

    #[test]
    fn wins_by_length_alone_give_one_half() {
        // Longer by 5: wins 9 of 10. Shorter by 5: loses 9 of 10. Mostly longer: raw win rate .74.
        let mut pattern = vec![(1.0, 5.0); 36];
        pattern.extend([(0.0, 5.0); 4]);
        pattern.extend([(0.0, -5.0); 9]);
        pattern.extend([(1.0, -5.0); 1]);
        let (wins, differences) = repeated(&pattern);
        let raw = wins.iter().sum::<f64>() / wins.len() as f64;
        let rate = win_rate(&wins, &differences);
        assert!((raw - 0.74).abs() < 1e-9, "{raw}");
        assert!((rate - 0.5).abs() < 1e-3, "{rate}");
    }

    #[test]
    fn the_fit_is_finite_if_length_decides_every_pair() {
        let (wins, differences) = repeated(&[(1.0, 3.0), (0.0, -3.0)]);
        let rate = win_rate(&wins, &differences);
        assert!((rate - 0.5).abs() < 1e-6, "{rate}");
        assert!((0.0..=1.0).contains(&win_rate(&[], &[])));
    }
}
