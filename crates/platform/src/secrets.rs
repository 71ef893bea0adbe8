//! The files that servers keep their secrets in.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Args;
use midspan_core::{credential::Credentials, deny::DenyList, ticket::TicketKeys};

use crate::{lifecycle::Lifecycle, watched::Watched};

/// Files with secrets. All are read again while running.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Secrets")]
pub struct SecretSettings {
    /// The keys that sign tickets: one or two lines of base64, the key that signs first
    #[arg(long, env = "MIDSPAN_TICKET_KEY_FILE", value_name = "FILE")]
    pub ticket_key_file: Option<PathBuf>,
    /// Revoked devices and services (JSON)
    #[arg(long, env = "MIDSPAN_DENY_FILE", value_name = "FILE")]
    pub deny_file: Option<PathBuf>,
    /// How often files and certificates are looked at for changes
    #[arg(long, env = "MIDSPAN_RELOAD_INTERVAL", default_value = "10s", value_name = "TIME", value_parser = crate::duration::positive)]
    pub reload_interval: Duration,
}

impl SecretSettings {
    /// Reads the ticket keys, and again whenever they change.
    pub async fn ticket_keys(&self, lifecycle: &Lifecycle) -> anyhow::Result<Watched<TicketKeys>> {
        let file = self.ticket_key_file.clone().context("--ticket-key-file is missing")?;
        Watched::read(file, self.reload_interval, lifecycle, |text| Ok(TicketKeys::from_text(text)?)).await
    }

    /// Reads the deny list, and again whenever it changes. Without a file nobody is denied.
    pub async fn deny_list(&self, lifecycle: &Lifecycle) -> anyhow::Result<Watched<DenyList>> {
        match self.deny_file.clone() {
            None => Ok(Watched::fixed(DenyList::default())),
            Some(file) => {
                Watched::read(file, self.reload_interval, lifecycle, |text| Ok(DenyList::from_json(text)?))
                    .await
            }
        }
    }

    /// Reads the credentials, and again whenever they change.
    pub async fn credentials(
        &self,
        file: PathBuf,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Watched<Credentials>> {
        Watched::read(file, self.reload_interval, lifecycle, |text| Ok(Credentials::from_json(text)?)).await
    }
}

/// What both roles need to check tickets and to cut what was revoked.
#[derive(Debug, Clone)]
pub struct Secrets {
    /// The keys that sign and verify tickets.
    pub tickets: Watched<TicketKeys>,
    /// Who is revoked.
    pub deny: Watched<DenyList>,
}

impl Secrets {
    /// The ticket keys of now.
    pub fn ticket_keys(&self) -> Arc<TicketKeys> {
        self.tickets.current()
    }
}
