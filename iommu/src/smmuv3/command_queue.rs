//! The command queue's consumer (IHI 0070 §4.1, §7.1).

use std::collections::BTreeMap;

use super::command::{Command, CommandKind};
use super::config::SmmuConfig;
use super::queue::{CMDQ, Queue};
use super::registers::Registers;
use super::spec::command::Cerror;
use super::spec::{cr0, gerror, queue, reg};
use crate::ram::GuestRam;

/// Fetches commands and counts those that were consumed.
pub(super) struct CommandQueue {
    config: SmmuConfig,
    consumed: BTreeMap<CommandKind, u64>,
}

impl CommandQueue {
    pub(super) const fn new(config: SmmuConfig) -> Self {
        Self {
            config,
            consumed: BTreeMap::new(),
        }
    }

    /// Number of consumed commands by kind.
    pub(super) const fn consumed(&self) -> &BTreeMap<CommandKind, u64> {
        &self.consumed
    }

    fn queue(&self, registers: &Registers) -> Queue {
        Queue::new(registers, &CMDQ, self.config.address_bits())
    }

    /// Number of commands in the queue; 0 while it is disabled or in error
    /// (§4.1.2).
    pub(super) fn waiting(&self, registers: &Registers) -> u32 {
        waiting(&self.queue(registers), registers)
    }

    /// The command at CMDQ_CONS. `None` when the queue is empty, or when the
    /// command is an error and stops the queue (§7.1).
    pub(super) fn fetch(&mut self, registers: &mut Registers, ram: &GuestRam) -> Option<Command> {
        let commands = self.queue(registers);
        if waiting(&commands, registers) == 0 {
            return None;
        }
        let cons = registers.get(reg::CMDQ_CONS);
        let raw = commands.read(ram, cons).ok_or(Cerror::Abt);
        match raw.and_then(|raw| Command::parse(&raw, &self.config, registers)) {
            Ok(command) => {
                *self.consumed.entry(command.kind()).or_default() += 1;
                Some(command)
            }
            Err(error) => {
                let cons = cons & !queue::ERR_MASK | u32::from(error as u8) << queue::ERR;
                registers.set(reg::CMDQ_CONS, cons);
                registers.global_error(gerror::CMDQ);
                None
            }
        }
    }

    /// Advances CMDQ_CONS by one command.
    pub(super) fn consume(&self, registers: &mut Registers) {
        let next = self.queue(registers).next(registers.get(reg::CMDQ_CONS));
        registers.set(reg::CMDQ_CONS, next);
    }
}

fn waiting(commands: &Queue, registers: &Registers) -> u32 {
    if !registers.enabled(cr0::CMDQEN) || registers.error_active(gerror::CMDQ) {
        return 0;
    }
    let prod = registers.get(reg::CMDQ_PROD);
    commands.used(prod, registers.get(reg::CMDQ_CONS))
}
