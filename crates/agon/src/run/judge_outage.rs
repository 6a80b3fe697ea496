//! A judge that cannot be asked, as the cause of a run without progress.

use preference::Outage;

/// `error` with the outage of the judge as its cause, if one of these waits is for its end: reasons with their durations in
/// seconds.
pub(crate) fn with_judge_outage(
    error: anyhow::Error,
    waits: impl IntoIterator<Item = (String, f64)>,
) -> anyhow::Error {
    let outage = waits
        .into_iter()
        .find(|(reason, _)| Outage::is_waited_for(reason));
    match outage {
        Some((reason, seconds)) => error.context(format!(
            "labels are waiting for {reason}, for {seconds:.0} s; the log names its last failure"
        )),
        None => error,
    }
}
