//! LoRA keys, which `[model]` and `[preference.fit]` share.

use crate::checks::Checks;

/// The adapter that a section configures.
pub(crate) struct LoraSettings<'a> {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) target_modules: &'a [String],
}

impl LoraSettings<'_> {
    pub(crate) fn check(&self, section: &str, checks: &mut Checks) {
        let path = |key: &str| format!("{section}.{key}");
        checks.positive(self.alpha, &path("lora_alpha"));
        checks.ratio_below_one(self.dropout, &path("lora_dropout"));
        checks.require(
            self.rank == 0 || !self.target_modules.is_empty(),
            &path("target_modules"),
            "name the modules to adapt, or \"all-linear\"",
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::assert_reported;

    #[test]
    fn invalid_adapters_are_reported_in_both_sections() {
        assert_reported(&[
            (
                "[model]\nlora_rank = 4\ntarget_modules = []",
                "model.target_modules: name the modules",
            ),
            (
                "[preference.fit]\nlora_rank = 4\ntarget_modules = []",
                "preference.fit.target_modules: name the modules",
            ),
            (
                "[model]\nlora_dropout = 1.0",
                "model.lora_dropout: 1 must be from 0 to below 1",
            ),
            (
                "[preference.fit]\nlora_alpha = 0.0",
                "preference.fit.lora_alpha: 0 must be",
            ),
        ]);
    }
}
