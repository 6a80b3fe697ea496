//! The state of a connection as its events tell it: whether the server is away, and what it last refused.

use std::sync::{Mutex, MutexGuard, PoisonError};

use async_nats::{Event, ServerError};
use tokio::time::Instant;

/// State of one connection, shared with its event handler.
#[derive(Debug, Default)]
pub(crate) struct ConnectionHealth(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Since when the server is away.
    away_since: Option<Instant>,
    /// End of the last outage.
    outage_end: Option<Instant>,
    /// Number of refusals, and the last one.
    refusals: u64,
    last_refusal: String,
}

impl ConnectionHealth {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment, so a poisoned value is consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the connection is lost and not restored yet.
    pub(crate) fn is_away(&self) -> bool {
        self.state().away_since.is_some()
    }

    /// The time until which the server was last away: now while it is, `None` if it never was.
    pub(crate) fn last_away(&self) -> Option<Instant> {
        let state = self.state();
        state
            .away_since
            .map(|_| Instant::now())
            .or(state.outage_end)
    }

    /// Number of requests that the server has refused for want of a permission.
    pub(crate) fn refusals(&self) -> u64 {
        self.state().refusals
    }

    /// The last refusal, if there was one since there were `before`.
    pub(crate) fn refusal_since(&self, before: u64) -> Option<String> {
        let state = self.state();
        (state.refusals > before).then(|| state.last_refusal.clone())
    }

    /// Records and logs an event of the client.
    pub(crate) fn handle(&self, event: &Event) {
        match event {
            Event::Disconnected => {
                self.state().away_since.get_or_insert_with(Instant::now);
                tracing::warn!("the connection to the NATS server is lost; reconnecting");
            }
            Event::Connected => self.restored(),
            Event::ServerError(ServerError::Other(refusal)) if is_permission(refusal) => {
                let is_new = {
                    let mut state = self.state();
                    state.refusals += 1;
                    let is_new = state.last_refusal != *refusal;
                    state.last_refusal.clone_from(refusal);
                    is_new
                };
                if is_new {
                    tracing::error!(
                        refusal,
                        "the NATS server refuses a request of this process: grant its user the permissions that agon \
                         nats-config prints for its role"
                    );
                }
            }
            Event::ServerError(error) => {
                tracing::warn!(%error, "the NATS server reports an error");
            }
            other => tracing::debug!(%other, "event of the NATS client"),
        }
    }

    fn restored(&self) {
        let mut state = self.state();
        let Some(since) = state.away_since.take() else {
            tracing::debug!("connected to the NATS server");
            return;
        };
        state.outage_end = Some(Instant::now());
        let seconds = since.elapsed().as_secs();
        tracing::info!(seconds, "connected to the NATS server again");
    }
}

fn is_permission(error: &str) -> bool {
    error.to_ascii_lowercase().contains("permissions violation")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_lasts_from_disconnection_to_reconnection() {
        let health = ConnectionHealth::default();
        health.handle(&Event::Connected);
        assert_eq!((health.is_away(), health.last_away()), (false, None));
        health.handle(&Event::Disconnected);
        let during = health.last_away();
        assert!(health.is_away() && during.is_some());
        health.handle(&Event::Connected);
        assert!(!health.is_away());
        assert!(health.last_away() >= during);
    }

    #[test]
    fn a_refusal_is_known_to_requests_that_began_before_it() {
        let health = ConnectionHealth::default();
        let refusal = "Permissions Violation for Publish to \"x\"";
        let before = health.refusals();
        let other = ServerError::Other("Unknown Protocol Operation".into());
        health.handle(&Event::ServerError(other));
        assert_eq!(health.refusal_since(before), None);
        health.handle(&Event::ServerError(ServerError::Other(refusal.into())));
        assert_eq!(health.refusal_since(before).as_deref(), Some(refusal));
        assert_eq!(health.refusal_since(health.refusals()), None);
    }
}
