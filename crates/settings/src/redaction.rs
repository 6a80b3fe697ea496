//! Removal of secrets from messages that quote a configuration.

/// The text with the user names and passwords of its URLs replaced, for messages that quote a configuration.
pub(crate) fn without_secrets(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + "://".len());
        shown.push_str(before);
        let ends = |c: char| c.is_whitespace() || "\"'`".contains(c);
        let (url, following) = after.split_at(after.find(ends).unwrap_or(after.len()));
        let hidden = url.rfind('@').map(|at| format!("…{}", &url[at..]));
        let shortened = hidden.as_deref().unwrap_or(url);
        let query = shortened.find(['?', '#']);
        shown.push_str(query.map_or(shortened, |query| &shortened[..query]));
        shown.push_str(if query.is_some() { "?…" } else { "" });
        rest = following;
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_show_urls_without_their_secrets() {
        let cases = [
            ("no URL: a@b", "no URL: a@b"),
            ("\"nats://host:4222\" is", "\"nats://host:4222\" is"),
            ("\"nats://u:p@host:4222\" is", "\"nats://…@host:4222\" is"),
            ("nats://a, nats://u:p@b", "nats://a, nats://…@b"),
            ("x://h/v1?key=p and y", "x://h/v1?… and y"),
            ("x://u:p@q@h?k#f", "x://…@h?…"),
        ];
        for (text, expected) in cases {
            assert_eq!(without_secrets(text), expected);
        }
    }
}
