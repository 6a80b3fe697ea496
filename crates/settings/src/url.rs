//! URLs of other services: they are written into run directories, logs and messages, so they hold no secrets.

use crate::checks::Checks;

/// Refuses a URL with a user name, a password, a query or a fragment, without repeating it. `remedy` says where a secret
/// belongs. Returns whether it has none.
pub(crate) fn check(url: &str, path: &str, remedy: &str, checks: &mut Checks) -> bool {
    let holds = !may_hold_secret(url);
    checks.require(
        holds,
        path,
        format!(
            "a URL is written to files and logs, so it may have no user name, password, query or fragment (no @, ? and \
             #): {remedy}"
        ),
    );
    holds
}

/// Whether a text has the parts of a URL that can hold a secret.
fn may_hold_secret(url: &str) -> bool {
    url.contains(['@', '?', '#'])
}
