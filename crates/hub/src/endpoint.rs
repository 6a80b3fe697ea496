//! URL of the Hub.

use url::Url;

use crate::error::HubError;

/// URL of the Hub, shown without a slash at its end.
#[derive(Debug, Clone)]
pub(crate) struct HubEndpoint {
    pub(crate) url: Url,
}

impl HubEndpoint {
    /// Parses the value of `HF_ENDPOINT`.
    ///
    /// # Errors
    /// When it is no HTTP URL, or has a user name or password, which messages would show.
    pub(crate) fn parse(text: &str) -> Result<Self, HubError> {
        let refused = |reason: &str| HubError::Endpoint(reason.to_owned());
        let url = Url::parse(text.trim()).map_err(|error| refused(&error.to_string()))?;
        if !["http", "https"].contains(&url.scheme()) || url.host().is_none() {
            Err(refused("it is no http:// or https:// URL"))
        } else if !url.username().is_empty() || url.password().is_some() {
            Err(refused(
                "it has a user name or password; set HF_TOKEN instead",
            ))
        } else if url.query().is_some() || url.fragment().is_some() {
            Err(refused("it has a query or a fragment"))
        } else {
            Ok(Self { url })
        }
    }
}

impl std::fmt::Display for HubEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
    }
}
