//! What no type can say about what a run tells of itself.

use super::Checks;
use crate::TelemetrySettings;

impl Checks {
    pub(super) fn telemetry(&mut self, telemetry: &TelemetrySettings) {
        self.at_least(telemetry.logging_steps, 1, "telemetry.logging_steps");
        let page = &telemetry.page;
        let Some(address) = telemetry.page_address() else {
            let message = format!(
                "{page:?} is not an address with a port, such as \"127.0.0.1:8080\"; \"\" is no page"
            );
            return self.require(page.is_empty(), "telemetry.page", message);
        };
        self.require(
            address.ip().is_loopback() || !telemetry.token_path.as_os_str().is_empty(),
            "telemetry.page",
            format!("{address} is reached by others: name a file with a token, telemetry.token_path, or listen on 127.0.0.1"),
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::{SettingsError, resolve};

    #[test]
    fn a_page_for_others_needs_a_token() {
        let cases = [
            ("page = \"\"", None),
            ("page = \"127.0.0.1:8080\"", None),
            ("page = \"[::1]:0\"", None),
            ("page = \"0.0.0.0:80\"\ntoken_path = \"token\"", None),
            ("page = \"0.0.0.0:80\"", Some("telemetry.token_path")),
            (
                "page = \"localhost\"",
                Some("is not an address with a port"),
            ),
            ("logging_steps = 0", Some("telemetry.logging_steps")),
        ];
        for (text, expected) in cases {
            let found = match resolve(&format!("[telemetry]\n{text}"), "test.toml", &[]) {
                Ok(_) => None,
                Err(SettingsError::Problems { problems, .. }) => Some(format!("{problems:?}")),
                Err(other) => panic!("{other}"),
            };
            match (found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) => assert!(found.contains(expected), "{found}"),
                (found, expected) => panic!("{text:?}: {found:?}, not {expected:?}"),
            }
        }
    }
}
