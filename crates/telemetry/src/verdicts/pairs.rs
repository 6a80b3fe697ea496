//! Verdicts as pairs in the form of TRL: `prompt`, `chosen`, `rejected`, as text or as messages.

use messages::{Dialogue, Message};
use serde_json::{Value, json};

use crate::printable::printable_json;
use crate::verdicts::{HumanVerdict, VerdictRow};

/// JSON Lines of the verdicts that prefer a completion. Ties and rejections of both are no pairs of this form.
pub(super) fn lines(rows: &[VerdictRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let [first, second] = &row.completions;
        let pair = match row.verdict {
            HumanVerdict::First => pair(row, first, second),
            HumanVerdict::Second => pair(row, second, first),
            HumanVerdict::Tie | HumanVerdict::BothBad => continue,
        };
        text.push_str(&printable_json(&pair.to_string()));
        text.push('\n');
    }
    text
}

fn pair(row: &VerdictRow, chosen: &str, rejected: &str) -> Value {
    let Some(dialogue) = &row.dialogue else {
        return json!({"prompt": row.prompt, "chosen": chosen, "rejected": rejected});
    };
    let answer = |text: &str| [Message::new("assistant", text)];
    let mut pair = json!({
        "prompt": dialogue.messages,
        "chosen": answer(chosen),
        "rejected": answer(rejected),
    });
    add_inputs(&mut pair, dialogue);
    pair
}

/// The other inputs of the chat template, in the columns that TRL reads.
fn add_inputs(pair: &mut Value, dialogue: &Dialogue) {
    if !dialogue.tools.is_empty() {
        pair["tools"] = json!(dialogue.tools);
    }
    if !dialogue.template_kwargs.is_empty() {
        pair["chat_template_kwargs"] = json!(dialogue.template_kwargs);
    }
}
